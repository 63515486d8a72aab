"""Worker processes that end with their parent, and threads' signals.

Grain reads batches in such processes, `pack` makes shards in them.
"""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Iterator

from dino_jax.errors import Failure

SIGNALS = (signal.SIGINT, signal.SIGHUP)  # sent to a whole process group by terminals


class WorkerDied(Failure):
    """A worker process ended by itself, as when the system is out of memory."""


def begin(*_: object) -> None:
    """Prepares a worker process, at its start: it ends as soon as its parent does, whatever ended that.

    The signals that are sent to a whole group are the parent's to handle: it ends its workers.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="watch", daemon=True).start()


def begin_reading(*_: object) -> None:
    """`begin` for processes that only read: SIGTERM, which schedulers send to every process, is the parent's too."""
    begin()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Blocks these signals in the calling thread, so that processes started here ignore them until they `begin`.

    Also starts multiprocessing's tracker, which removes what a killed parent leaves in /dev/shm, without its warning.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.warnoptions.append("ignore:resource_tracker")
    multiprocessing.resource_tracker.ensure_running()
    sys.warnoptions.remove("ignore:resource_tracker")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # starting the tracker unblocks SIGINT
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def died(setting: str, status: int | None) -> WorkerDied:
    """The error for a worker that ended by itself; `setting` is the number of workers, such as `run.workers`."""
    if status is not None and status < 0:
        how = f"was killed by {signal.Signals(-status).name} (out of memory?): lower {setting}"
    else:
        how = f"ended by itself (status {status}): see above, or lower {setting}"
    return WorkerDied(f"{setting}: a worker process {how}, and run the same command again")
