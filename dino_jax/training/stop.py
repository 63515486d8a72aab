"""Stopping on request: SIGTERM (a preemption, a scheduler's time limit), SIGHUP (a lost terminal), the first Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SAME = 0.5  # seconds within which a group's processes get one signal


class Interrupted(BaseException):
    """A signal came while `StopSignal.interrupting`."""


class StopSignal:
    """Context that records signals instead of exiting; a second SIGINT interrupts as usual, except while `protecting`.

    Signals that were ignored before (nohup, background jobs) stay ignored. It does nothing outside the main thread,
    where Python delivers no signals.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.number = 0  # the signal received; 0: none
        self._interrupting = self._protecting = False

    def __enter__(self) -> StopSignal:
        main = threading.current_thread() is threading.main_thread()
        wanted = [s for s in self.SIGNALS if signal.getsignal(s) != signal.SIG_IGN] if main else []
        self._previous = {s: signal.signal(s, self._note) for s in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def soon(self) -> bool:
        """Whether a signal came, or comes within `SAME` seconds: one for the whole group may reach workers first."""
        deadline = time.monotonic() + SAME
        while not self.number and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.number > 0

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """For waits that may never end: a signal raises `Interrupted` in the block, at once if it came before."""
        self._interrupting = True
        try:
            if self.number:
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    @contextlib.contextmanager
    def protecting(self) -> Iterator[None]:
        """For saving: no signal interrupts the block."""
        self._protecting = True
        try:
            yield
        finally:
            self._protecting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, number
        if self._protecting:
            return
        if self._interrupting:
            self._interrupting = False
            raise Interrupted
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
