"""Stopping on request: SIGTERM (a preemption, a scheduler's time limit) and the first Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Context that records SIGTERM and SIGINT instead of exiting; a second SIGINT interrupts as usual.

    It does nothing outside the main thread, where Python delivers no signals.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0  # the signal received; 0: none

    def __enter__(self) -> StopSignal:
        main = threading.current_thread() is threading.main_thread()
        self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
