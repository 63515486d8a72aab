"""The one exception for mistakes a user can mend, and what is said where something cannot be written."""

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

    A dotted word is also compared by its last part.
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    near = near or [name for name in known if last(name) == last(word)]
    near = near or difflib.get_close_matches(last(word), map(last, known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def cause(error: BaseException) -> str:
    """The error in a line; the system's words alone where a library wraps them in long ones."""
    text = " ".join(str(error).split())
    known = next((words for words in (*FULL, *SHUT) if words in text), None)
    return known or getattr(error, "strerror", None) or text[:300] or type(error).__name__


def unwritable(what: str, error: BaseException) -> UserError:
    """`what` ("PATH: cannot write"), why, and the mend."""
    reason, mend = cause(error), ""
    if reason in FULL:
        mend = "; make room there, then the same command goes on from what was saved"
    elif reason in SHUT:
        mend = "; make it writable or name another folder"
    return UserError(f"{what}: {reason}{mend}")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Errors of files within, and any where `what` names a bucket, whose errors are of many kinds, are `unwritable`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(what):
            raise
        raise unwritable(what, error) from error
