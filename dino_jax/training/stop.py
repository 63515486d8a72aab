"""Stopping when asked: SIGTERM (a preemption, a scheduler's time limit) and the first Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """While entered, notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts as usual.

    Outside the main thread, where Python delivers no signals, it never asks to stop.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0  # of the signal that came

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
