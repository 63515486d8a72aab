"""Threads and processes that compute numbered results, such as the chunks of batches or packed shards.

A worker process has one socket to its parent and shares nothing else with it: no shared memory and no semaphores, whose
names would stay in /dev/shm after kill -9. It ends as soon as the socket closes, whatever ended its parent. Signals
sent to the whole process group (Ctrl-C) reach only the parent, which ends its workers. Threads are daemons: one that is
stuck in a read does not keep its process alive.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection, resource_tracker, util
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np

from dino_jax.errors import Failure, UserError

LOOK = 0.2  # seconds between looks at whether the pool was closed
PATIENCE = 3.0  # seconds that closing waits for threads
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # not delivered to workers
FRAME = struct.Struct("<q")


class Task(Protocol):
    """Computes results by number."""

    def work(self, number: int) -> tuple[Any, list[np.ndarray]]:
        """A value that can be pickled, and large arrays."""

    def room(self, number: int) -> list[np.ndarray]:
        """In the parent of worker processes: where the arrays of a result go; C-contiguous."""


class Result(NamedTuple):
    """What became of one number."""

    number: int
    value: Any
    arrays: list[np.ndarray]  # not sent: they are in `Task.room`
    error: Exception | None


class WorkerDied(Failure):
    """A worker process ended by itself, as when the system is out of memory."""


class Pool:
    """Computes `task.work(number)` in threads of this process or of worker processes.

    Args:
      task: sent to the processes with cloudpickle.
      processes: number of worker processes; 0: threads of this process.
      threads: in each process, at least 1.
      name: of the setting that sets the number of processes, for errors.
    """

    def __init__(self, task: Task, processes: int, threads: int, name: str = "workers"):
        self._closed = threading.Event()
        self._crew: _Threads | _Processes
        self._crew = _Processes(task, processes, threads, name) if processes else _Threads(task, threads)

    def __del__(self) -> None:
        if hasattr(self, "_crew"):
            self.close()

    def results(self, numbers: Iterable[int], ahead: int, *, ordered: bool = True) -> Iterator[tuple[int, Any]]:
        """Yields (number, value), in the order of `numbers` or as they come.

        At most `ahead` are asked for beyond those yielded. Ends early if the pool is closed.

        Raises:
          WorkerDied: a process did.
          Exception: what `task.work` raised, with the worker's traceback as a note.
        """
        rest, asked = iter(numbers), collections.deque[int]()
        ready: dict[int, Result] = {}
        while True:
            for number in itertools.islice(rest, ahead - len(asked)):
                self._crew.ask(number)
                asked.append(number)
            if not asked:
                return
            while not (asked[0] in ready if ordered else ready):
                if self._closed.is_set():
                    return
                ready.update((result.number, result) for result in self._crew.received(LOOK))
            result = ready.pop(asked[0] if ordered else next(iter(ready)))
            asked.remove(result.number)
            number, value, _, error = result
            del result  # the memory of its arrays can be used again
            if error is not None:
                raise error
            yield number, value

    def close(self) -> None:
        """Ends the threads and processes. Another thread may call this while one waits for results."""
        if not self._closed.is_set():
            self._closed.set()
            self._crew.close()


class _Threads:
    """Daemon threads of this process."""

    def __init__(self, task: Task, count: int):
        self._task = task
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.made: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name="reader", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def ask(self, number: int) -> None:
        self._asked.put(number)

    def received(self, timeout: float) -> Sequence[Result]:
        try:
            return [self.made.get(timeout=timeout)]
        except queue.Empty:
            return []

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._asked.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (number := self._asked.get()) is not None and not self._closed:
            try:
                result = Result(number, *self._task.work(number), None)
            except Exception as error:
                result = Result(number, None, [], error)
            self.made.put(result)
            del result  # its memory can be used again


class _Worker(NamedTuple):
    process: Any
    socket: socket.socket
    asked: set[int]


class _Processes:
    """Worker processes, each with a socket: numbers go there, results come back."""

    def __init__(self, task: Task, count: int, threads: int, name: str):
        self._task, self._name, self._workers = task, name, list[_Worker]()
        util.Finalize(self, _end, args=(self._workers,), exitpriority=10)  # before multiprocessing waits for them
        context, pickled = multiprocessing.get_context("spawn"), cloudpickle.dumps(task)
        resource_tracker.ensure_running()  # it unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the workers inherit it
        try:
            for _ in range(count):
                ours, theirs = socket.socketpair()
                process = context.Process(target=_serve, args=(pickled, theirs, threads), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, set()))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, number: int) -> None:
        """Asks the worker with the least to do."""
        worker = min(self._workers, key=lambda worker: len(worker.asked))
        worker.asked.add(number)
        try:
            worker.socket.sendall(FRAME.pack(number))
        except OSError:
            raise self._died(worker) from None

    def received(self, timeout: float) -> Sequence[Result]:
        by_socket: dict[Any, _Worker] = {worker.socket: worker for worker in self._workers}
        return [self._receive(by_socket[one]) for one in connection.wait(list(by_socket), timeout)]

    def close(self) -> None:
        _end(self._workers)

    def _receive(self, worker: _Worker) -> Result:
        try:
            (size,) = FRAME.unpack(_read(worker.socket, bytearray(FRAME.size)))
            number, value, error = pickle.loads(_read(worker.socket, bytearray(size)))
            worker.asked.discard(number)
            for array in self._task.room(number) if error is None else ():
                _read(worker.socket, array)
        except (EOFError, OSError):
            raise self._died(worker) from None
        return Result(number, value, [], error)

    def _died(self, worker: _Worker) -> WorkerDied:
        worker.process.join(1)
        status = worker.process.exitcode
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name} (out of memory?): lower {self._name}"
        else:
            how = f"ended by itself (status {status}): see above, or set {self._name}=0"
        return WorkerDied(f"{self._name}: a worker process {how}, and run the same command again")


def _end(workers: Sequence[_Worker]) -> None:
    """Kills the workers: they hold nothing that could be lost."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads from it
        worker.process.join(1)


def _read(source: socket.socket, target: Any) -> Any:
    """Fills a buffer. Raises EOFError if the other side has ended."""
    view = memoryview(target).cast("B") if len(target) else memoryview(b"")
    while len(view):
        count = source.recv_into(view, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        view = view[count:]
    return target


def _serve(pickled: bytes, parent: socket.socket, threads: int) -> None:
    """The main function of a worker process."""
    readers = _Threads(cloudpickle.loads(pickled), threads)
    threading.Thread(target=_send_results, args=(readers, parent), daemon=True).start()
    try:
        while True:
            readers.ask(*FRAME.unpack(_read(parent, bytearray(FRAME.size))))
    except (EOFError, OSError):
        os._exit(0)


def _send_results(readers: _Threads, parent: socket.socket) -> None:
    try:
        while True:
            result = readers.made.get()
            head = _pickled(result)
            parent.sendall(FRAME.pack(len(head)) + head)
            for array in result.arrays:
                parent.sendall(array.data.cast("B"))
            del result, array  # their memory can be used again
    except OSError:
        os._exit(0)


def _pickled(result: Result) -> bytes:
    error = result.error
    if error is None or isinstance(error, UserError):
        return cloudpickle.dumps((result.number, result.value, error))
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In a worker process:\n{text}")
        pickle.loads(data := cloudpickle.dumps((result.number, None, error)))
        return data
    except Exception:  # errors that cannot be pickled
        return pickle.dumps((result.number, None, RuntimeError(f"in a worker process:\n{text}")))
