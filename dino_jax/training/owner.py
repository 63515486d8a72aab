"""One run at a time in a workdir: `WORKDIR/owner.json` names the process that trains there and shows that it lives.

The process holds a lock on the file (flock), which the system releases however the process ends, and writes a new sign
of life into it every `BEAT` seconds. The signs count where locks do not: in buckets, on file systems without locks,
between machines. Whoever finds the file without its lock takes over

- at once, if it names a process of this machine that is gone (kill -9, out of memory);
- after `SILENCE` seconds without a sign of life, if it names another machine. Clocks differ, so that the time in the
  file only shortens the wait: a new sign is awaited for `LOOK` seconds, longer than `BEAT`, in any case.

A run that finds another one in its file ends without writing. A removed file lets the next run take over.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from dino_jax.data.storage import is_remote, read_file, write_atomically, writing
from dino_jax.errors import Failure, UserError, printable

BEAT = 20.0  # seconds between signs of life
LOOK = 25.0  # the least to wait for one
SILENCE = 180.0  # seconds without one after which a run on another machine counts as gone
SIZE = 1000  # bytes of the file, so that a reader never sees an old end behind a new beginning

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """What the file says of its owner."""

    id: str  # drawn by the run
    host: str
    pid: int
    since: str
    seen: str  # the last sign of life, by the owner's clock
    beats: int  # how many signs there were
    machine: str  # what tells machines and containers apart
    process: str  # when the process started, in the machine's count; "": unknown

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}, last sign of life {self.seen}"


class Owner:
    """The ownership of a workdir; from `owning`."""

    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / "owner.json"
        self._file: int | None = None  # a local file, which the lock belongs to
        self._taker: Record | None = None
        self._ended = threading.Event()
        now, host = _now(), socket.gethostname()
        self._mine = Record(
            secrets.token_hex(8), host, os.getpid(), now, now, 0, _machine(), _started(os.getpid()) or ""
        )

    def check(self, look: bool = True) -> None:
        """Raises `Failure` if another run has taken over; `look`: read the file now, not only every `BEAT` seconds."""
        if look and self._taker is None:
            self._look()
        if self._taker:
            raise Failure(f"{self._workdir}: another run has taken over ({self._taker}): this one ends without saving")

    def take(self) -> None:
        """Takes the workdir over from nobody, or from a run that is gone; `UserError` if there is another one."""
        if not is_remote(self._path):
            self._file = self._lock()
        self._await_end()
        self._write()
        if is_remote(self._path):
            time.sleep(1.0)  # another that starts in this moment writes last
            self._look()
            if self._taker:
                raise self._refusal(self._taker)
        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def leave(self) -> None:
        """Ends the ownership and removes the file, if it is this run's."""
        self._ended.set()
        with contextlib.suppress(Exception):
            found = _read(self._path)
            if found and found.id == self._mine.id:
                self._path.unlink()
        if self._file is not None:
            os.close(self._file)

    def _lock(self) -> int:
        """Opens the file and locks it, where the file system has locks."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise self._refusal(_read(self._path)) from None
            except OSError:  # no locks here
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file
            os.close(file)  # its owner removed it in this moment

    def _await_end(self) -> None:
        """Returns once no run owns the workdir; raises `UserError` if one does."""
        found = _read(self._path)
        if found is None:
            return
        if found.machine == self._mine.machine:
            if _started(found.pid) == found.process:
                raise self._refusal(found)
        else:
            self._await_silence(found)
        log.info("%s: taking over from a run that is gone (%s)", self._workdir, found)

    def _await_silence(self, found: Record) -> None:
        """Waits until a run on another machine was silent for long enough; raises `UserError` at a sign of life."""
        wait = max(LOOK, SILENCE - max(_age(found.seen), 0))
        log.info("%s: owned by another run (%s); waiting %.0f s for a sign of life", self._workdir, found, wait)
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            now = _read(self._path)
            if now is None:
                return
            if now != found:
                raise self._refusal(now)

    def _refusal(self, owner: Record | None) -> UserError:
        return UserError(
            f"--workdir={self._workdir}: another run is training there ({owner or 'it starts'}): stop it first, or "
            f"name another --workdir; remove {self._path} to take over from one that cannot be stopped, or wait until "
            f"{SILENCE:.0f} s after its last sign of life"
        )

    def _write(self) -> None:
        data = json.dumps(self._mine._asdict()).ljust(SIZE - 1).encode() + b"\n"
        with writing(f"{self._path}: cannot write"):
            if self._file is None:
                write_atomically(self._path, data)
            else:
                os.pwrite(self._file, data, 0)  # in place: the lock belongs to this file

    def _look(self) -> None:
        with contextlib.suppress(Exception):  # a network that is down says nothing of the owner
            found = _read(self._path)
            if found and found.id != self._mine.id:
                self._taker = found

    def _beat(self) -> None:
        """Shows that this run lives, until it leaves or another takes over. A removed file is not written again."""
        while not self._ended.wait(BEAT) and not self._taker:
            with contextlib.suppress(Exception):
                self._look()
                if not self._taker and _read(self._path):
                    self._mine = self._mine._replace(seen=_now(), beats=self._mine.beats + 1)
                    self._write()


@contextlib.contextmanager
def owning(workdir: epath.Path) -> Iterator[Owner]:
    """Owns the workdir during the block; waits up to `SILENCE` seconds if its owner seems to be gone.

    Raises:
      UserError: another process trains there, or the workdir cannot be written.
    """
    owner = Owner(workdir)
    try:
        with writing(f"--workdir={workdir}: cannot write there"):
            workdir.mkdir(parents=True, exist_ok=True)
            owner.take()
        yield owner
    finally:
        owner.leave()


def _read(path: epath.Path) -> Record | None:
    """The owner that the file names; None if there is no file, or it holds something else."""
    try:
        values: Any = json.loads(read_file(path, limit=1 << 16))
        texts = {name: printable(str(values[name])) for name in Record._fields}
        return Record(**texts | {"pid": int(values["pid"]), "beats": int(values["beats"])})  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _machine() -> str:
    """Equal for processes that see each other: host name, boot and the container's process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started ("": unknown), or None if it is gone."""
    if os.path.isdir("/proc/self"):
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state[0] in "ZX" else state[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")


def _age(text: str) -> float:
    """Seconds since a time of `_now`, by this clock; 0 if it is none."""
    try:
        then = datetime.datetime.fromisoformat(text)
        return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    except (ValueError, TypeError):
        return 0.0
