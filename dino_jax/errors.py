"""The exception for mistakes that a user can fix, and the messages that many places share."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator

from dino_jax.storage import is_remote

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
SHUT = tuple(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST))


class UserError(ValueError):
    """Bad input. The message is one line that names the file or key and says what to do; the CLI prints just that."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: `; did you mean 'optim.lr'?`, or "" where no known word is near.

    Names with the same last part come first; a dotted word is also compared by its last part.
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    known = list(known)
    same = [name for name in known if last(name) == last(word)]
    near = difflib.get_close_matches(word, same, 1, 0.0) or difflib.get_close_matches(word, known, 1)
    near = near or difflib.get_close_matches(last(word), map(last, known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def cause(error: BaseException) -> str:
    """The error in one line: the system's own words where a library wraps them in longer ones."""
    text = " ".join(str(error).split())
    known = next((words for words in (*FULL, *SHUT) if words in text), None)
    return known or getattr(error, "strerror", None) or text[:300] or type(error).__name__


def unwritable(what: str, error: BaseException) -> UserError:
    """The error for `what` ("PATH: cannot write"), with the reason and the fix."""
    reason, fix = cause(error), ""
    if reason in FULL:
        fix = "; make room there, then the same command goes on from what was saved"
    elif reason in SHUT:
        fix = "; make it writable or name another folder"
    return UserError(f"{what}: {reason}{fix}")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises OSErrors of the block as `unwritable`; where `what` names a bucket, all errors: clients have their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(what):
            raise
        raise unwritable(what, error) from error
