"""Talks to the other processes of a run through the key-value store of JAX's coordination service.

Used for the start-up checks, before collectives can be trusted, and for failing together. A process that fails writes
the reason there, and all look every second, so none waits in a collective for a dead process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError

FAILED = "dino/failed"  # key written by the first process to fail: [process, status, reason]
LOOK = 1.0  # seconds between looks at it
SILENCE = 6.0  # seconds without a sign of life before a process counts as dead, after a failure


class Verdict(UserError):
    """What process 0 found wrong in the reports of all processes. All raise it; process 0 prints it."""


class ProcessGroup:
    """The `count` processes of a run, seen from one of them.

    Args:
      rank: this process's number.
      client: of JAX's coordination service.
      patience: seconds until a check counts as failed.
    """

    def __init__(self, rank: int, count: int, client: Any, patience: float):
        self.rank, self.count, self.patience = rank, count, patience
        self.waiting: tuple[str, float, float] | None = None  # main thread: what for, since when, time limit
        self._client, self._rounds = client, 0
        self._leaving, self._over = threading.Lock(), threading.Event()
        self._set(f"dino/host/{rank}", socket.gethostname())
        if rank:
            logging.getLogger("dino_jax").setLevel(logging.WARNING)
        self._thread = threading.Thread(target=self._look, name="processes", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Leaves together with the others, after success."""
        self._over.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Reports the error to the user and the other processes, unless another one failed before; exits.

        If a collective fails because another process died, that process is named.
        """
        status, reason = 1, " ".join("".join(traceback.format_exception_only(error)).split())[:500]
        if isinstance(error, UserError):
            status, reason = error.status, str(error)
        elif isinstance(error, KeyboardInterrupt):
            status, reason = 130, "interrupted"
        elif isinstance(error, SystemExit):
            status, reason = error.code if isinstance(error.code, int) else 1, f"exit {error.code}"
        elif silent := self._silent():
            reason = f"{' and '.join(map(self.name, silent))} died: no sign of life for {SILENCE:g} s"
        elif self._failed() is None:
            traceback.print_exception(error)
        self._leave(status, reason, quiet=isinstance(error, Verdict) and self.rank > 0)

    def name(self, rank: int) -> str:
        """`process 3 (its host)`."""
        host = self._get(f"dino/host/{rank}")
        return f"process {rank} ({host})" if host else f"process {rank}"

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raises `Verdict` unless all processes have the same facts (what -> value) and run the same code."""

        def judge(reports: list[str]) -> str:
            first, *others = map(json.loads, reports)
            for rank, theirs in enumerate(others, 1):
                differ = [key for key in first | theirs if first.get(key) != theirs.get(key)]
                shown = [f"{key}: {theirs.get(key, 'none')} against {first.get(key, 'none')}" for key in differ[:3]]
                more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
                if differ:
                    return f"{self.name(rank)} differs from {self.name(0)} in {'; '.join(shown)}{more}"
            return ""

        self._round("what it is going to run", json.dumps(dict(facts) | code_facts()), judge)

    def check_devices(self) -> None:
        """Raises `Verdict` unless every device of every process answers, alone and then all together."""

        def judge(reports: list[str]) -> str:
            return next((f"{self.name(rank)}: {report}" for rank, report in enumerate(reports) if report), "")

        self._round("whether its devices answer", self._in_time(_each_answers), judge)
        self._round("the outcome of a sum over all devices", self._in_time(_all_answer), judge)

    def check_shared(self, folder: epath.Path) -> None:
        """Raises `Verdict` if a process does not see in `folder` what process 0 writes there."""
        key = f"dino/mark/{self._rounds}"
        if self.rank == 0:
            self._set(key, f"started-{os.getpid()}-{time.time_ns()}")
            (folder / self._hear(key)).write_text("removed once every process has seen it")
        mark = folder / self._hear(key)

        def judge(reports: list[str]) -> str:
            mark.unlink()
            there = f"does not see what {self.name(0)} writes to {folder}: the workdir must be shared, or gs://"
            return next((f"{self.name(rank)} {there}" for rank, report in enumerate(reports) if not report), "")

        self._round("whether it sees the workdir", "yes" if _appears(mark) else "", judge)

    def _round(self, what: str, report: str, judge: Callable[[list[str]], str]) -> None:
        """Collects all reports; process 0 judges them, and all raise its verdict unless that is ""."""
        self._rounds += 1
        key = f"dino/round/{self._rounds}"
        self._set(f"{key}/{self.rank}", report)
        if self.rank == 0:
            self._set(f"{key}/verdict", self._late(key, what) or judge([self._hear(f"{key}/{r}") for r in self._all()]))
        if verdict := self._hear(f"{key}/verdict", extra=10):
            raise Verdict(verdict)

    def _late(self, key: str, what: str) -> str:
        """The message that names who has not reported in time; "": all have."""
        deadline = time.monotonic() + self.patience
        late = list(self._all())
        while late and time.monotonic() < deadline:
            late = [rank for rank in late if self._get(f"{key}/{rank}") is None]
            time.sleep(0.05 if late else 0)
        names = " and ".join(map(self.name, late))
        return f"{names} did not say within {self.patience:.0f} s {what} (DINO_START_TIMEOUT)" if late else ""

    def _look(self) -> None:
        """The background thread: gives signs of life, looks for failures, and limits the main thread's waits."""
        beats = 0
        while not self._over.wait(LOOK):
            beats += 1
            self._set(f"dino/alive/{self.rank}", str(beats))
            if self._failed() is not None:
                self._leave(1, "")
            waiting = self.waiting
            if waiting is not None and time.monotonic() > waiting[1] + waiting[2]:
                self._leave(1, f"waited {waiting[2]:.0f} s for {waiting[0]} (run.stall_timeout)")

    def _silent(self) -> list[int]:
        """The processes that give no sign of life for `SILENCE` seconds from now."""
        before = [self._get(f"dino/alive/{rank}") for rank in self._all()]
        time.sleep(SILENCE)
        return [rank for rank in self._all() if self._get(f"dino/alive/{rank}") == before[rank] and rank != self.rank]

    def _leave(self, status: int, reason: str, quiet: bool = False) -> NoReturn:
        """Exits without the handlers that wait for others. The first to fail and process 0 print the reason."""
        self._leaving.acquire()  # never released: only one thread may come here
        if reason and not quiet:
            self._set(FAILED, json.dumps([self.rank, status, reason]), overwrite=False)
        first, status, why = self._failed() or (self.rank, status, reason)
        if self.rank == 0 and why != reason:
            print(f"dino-jax: error: {self.name(first)}: {why}", file=sys.stderr)
        elif first == self.rank and not quiet:
            print(f"dino-jax: error: {why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(2 * LOOK)  # the store ends with this process: the others need time to look
        os._exit(status)

    def _failed(self) -> tuple[int, int, str] | None:
        text = self._get(FAILED)
        if text is None:
            return None
        rank, status, reason = json.loads(text)
        return rank, status, reason

    def _all(self) -> range:
        return range(self.count)

    def _set(self, key: str, value: str, overwrite: bool = True) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is there already; or the store is gone
            self._client.key_value_set(key, value, allow_overwrite=overwrite)

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def _hear(self, key: str, extra: float = 0) -> str:
        try:
            return self._client.blocking_key_value_get(key, int(1000 * (self.patience + extra)))
        except jax.errors.JaxRuntimeError:
            raise UserError(f"{self.name(0)} does not answer any more") from None

    def _in_time(self, action: Callable[[], str]) -> str:
        """Runs `action()`; returns what it finds wrong, or that it timed out."""
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(_complaint(action)), daemon=True)
        thread.start()
        thread.join(0.9 * self.patience)
        return found[0] if found else f"no answer of the devices within {0.9 * self.patience:.0f} s"


def _complaint(action: Callable[[], str]) -> str:
    try:
        return action()
    except Exception as error:
        return " ".join(str(error).split())[:300] or type(error).__name__


def _each_answers() -> str:
    """Asks each device of this process for a sum; what is wrong, or ""."""
    for device in jax.local_devices():
        if int(jax.device_put(np.int32(1), device) + 1) != 2:
            return f"{device} cannot add 1 and 1"
    return ""


def _all_answer() -> str:
    """Asks all devices together for a sum; what is wrong, or ""."""
    mesh = Mesh(np.array(jax.devices()), "all")
    each = NamedSharding(mesh, PartitionSpec("all"))
    ones = jax.make_array_from_callback((mesh.size,), each, lambda _: np.ones(1, np.int32))
    total = int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    return "" if total == mesh.size else f"the sum over {mesh.size} devices is {total}"


def _appears(path: epath.Path) -> bool:
    """Whether the path appears within 20 seconds: NFS shows new files late."""
    for _ in range(40):
        if path.exists():
            return True
        time.sleep(0.5)
    return False


def code_facts() -> dict[str, str]:
    """Versions, and a hash of each file of the package to detect edited copies."""
    root = pathlib.Path(__file__).parents[1]
    facts = {"python": sys.version.split()[0], "jax": jax.__version__}
    for path in sorted(root.rglob("*.py")):
        facts[f"{root.name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return facts
