"""One run at a time in a workdir: `WORKDIR/owner.json` names the process that trains there, which holds a lock on it.

The system releases the lock however the process ends, so that after kill -9 the same command resumes at once. On file
systems without locks and in buckets there is no such check.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from etils import epath

from dino_jax.data.storage import is_remote, writing
from dino_jax.errors import UserError, printable


@contextlib.contextmanager
def owning(workdir: epath.Path) -> Iterator[None]:
    """Owns the workdir during the block.

    Raises:
      UserError: another process trains there, or the workdir cannot be written.
    """
    if is_remote(workdir):
        yield
        return
    path = workdir / "owner.json"
    with writing(f"--workdir={workdir}: cannot write there"):
        workdir.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = printable(os.pread(number, 1000, 0).decode("utf-8", "replace"))
            raise UserError(
                f"--workdir={workdir}: another run is training there ({text}): stop it first, or name another --workdir"
            ) from None
        except OSError:  # no locks on this file system
            yield
            return
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
        with writing(f"{path}: cannot write"):
            os.ftruncate(number, 0)
            os.pwrite(number, owner.encode(), 0)
        yield
    finally:
        os.close(number)
