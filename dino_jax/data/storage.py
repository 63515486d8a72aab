"""Files on local disks and in buckets: reading only regular files, writing whole files, and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from dino_jax.errors import UserError

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
SHUT = tuple(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST))


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is a URL such as gs://bucket/folder, not a path of this machine."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` with `~` expanded, made absolute if local."""
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()


def open_file(path: epath.PathLike) -> BinaryIO:
    """Opens a regular file for reading, or an object of a bucket.

    Raises:
      OSError: it cannot be opened, or it is a folder, a named pipe, a device or a socket, which could block or never
        end; the reason is in `strerror`.
    """
    if is_remote(path):
        return epath.Path(path).open("rb")
    number = os.open(os.fspath(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise OSError(errno.EINVAL, f"not a regular file but {_kind(mode)}", str(path))
    return os.fdopen(number, "rb")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((kind for test, kind in kinds.items() if test(mode)), "something else")


def read_file(path: epath.PathLike, limit: int | None = None) -> bytes:
    """The whole content of a regular file or of an object in a bucket.

    Raises:
      OSError: as `open_file` does, or it has more than `limit` bytes.
    """
    with open_file(path) as file:
        if limit is None:
            return file.read()
        size = limit if is_remote(path) else os.fstat(file.fileno()).st_size
        data = file.read(min(size, limit) + 1)
        if size < len(data) <= limit:  # it grew, or is one of the system's files, which have no size
            data += file.read(limit + 1 - len(data))
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit >> 20} MiB", str(path))
    return data


def read_text(path: epath.PathLike) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: it cannot be read or is not UTF-8.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from error


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """The value of a JSON file, a `kind` (dict or list).

    Raises:
      UserError: it cannot be read, is not JSON, or holds another type.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {cause(error)}") from error
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: holds {type(value).__name__} where {expected} is expected")
    return value


def ensure_writable(folder: epath.PathLike, what: str) -> None:
    """Makes a folder and writes a file in it for a moment, so that work whose result goes there fails before it begins.

    Raises:
      UserError: it cannot be written; the message begins with `what`, such as "--out=PATH".
    """
    folder = absolute(folder)
    with writing(f"{what}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tried").write_text("")
        (folder / ".tried").unlink(missing_ok=True)  # another process may try at the same time


def ensure_new_file(path: epath.PathLike, what: str) -> None:
    """As `ensure_writable` for a file that will be written at `path`, where a file may be but nothing else.

    Raises:
      UserError: it cannot be written; the message begins with `what`, such as "--out=PATH".
    """
    target = absolute(path)
    if str(path).endswith("/") or target.is_dir():
        raise UserError(f"{what}: this is a folder: name a file in it")
    if not is_remote(path) and target.exists() and not pathlib.Path(target).is_file():
        raise UserError(f"{what}: cannot be written: this is not a regular file, which would be replaced")
    ensure_writable(target.parent, what)


def write_atomically(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file (text as UTF-8), folders included. Readers see the old file or the new one, even after a kill.

    Raises:
      OSError: it cannot be written; the old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        epath.Path(path).write_bytes(data)  # an object appears whole or not at all
        return
    with new_file(path) as local:
        local.write_bytes(data)


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """A local file to write, moved to `path` at the end; after an exception nothing is left of it.

    For writers that need a file. If `path` is local, the last step is one rename in its folder.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, epath.Path(path).name)
            yield local
            epath.Path(local).copy(path, overwrite=True)
        return
    target = pathlib.Path(absolute(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def cause(error: BaseException) -> str:
    """The error in one line: the system's words, if a library wraps them in longer ones."""
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
    """Raises the block's OSErrors as `unwritable`; for buckets all errors, since clients raise their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(what):
            raise
        raise unwritable(what, error) from error
