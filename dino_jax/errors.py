"""The one exception for mistakes a user can mend, and what is said where something cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from dino_jax.storage import is_remote

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
SHUT = tuple(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST))


class UserError(ValueError):
    """Bad input. The message is one line that names the file or key and says what to do; the CLI prints just that."""


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
