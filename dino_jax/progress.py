"""One line on the terminal for long work: how far, at what pace, how long still."""

from __future__ import annotations

import collections
import datetime
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO


class Progress:
    """One line on a terminal, redrawn: step, given fields, time left. Elsewhere a plain line now and then.

        train [=========>          ] 1200/2500  ETA 0:12:30  epoch 4.8  loss 5.312  images/s 412

    Args:
        total: steps at the end; `initial`: steps done before.
        description: the first word of the line.
        active: False: silent.
        interval: seconds between lines where the stream is not a terminal.
        stream: standard error unless given.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        *,
        active: bool = True,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self._description, self._active, self._clock = description, active, clock
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._interval = 0.1 if self._live else interval
        self._shown = -math.inf
        self._line = ""
        self._history = collections.deque([(clock(), initial)], maxlen=200)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, **fields: float | str) -> None:
        """`step` steps are done. Cheap: most calls draw nothing."""
        now = self._clock()
        if step < self._history[-1][1]:  # a rewind
            self._history.clear()
        self._history.append((now, step))
        if self._active and (now - self._shown >= self._interval or step >= self.total):
            self._line, self._shown = self._format(step, fields), now
            self._draw(self._line)

    def note(self, line: str) -> None:
        """Prints a line of its own above the bar."""
        if self._active:
            self._stream.write(("\r\x1b[K" if self._live else "") + line + "\n")
            if self._live and self._line:
                self._draw(self._line)
            self._stream.flush()

    def close(self) -> None:
        """Leaves the last state of the bar standing on its line."""
        if self._active and self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._active = False

    def eta(self) -> float:
        """Seconds left at the pace of the last 200 updates; infinity before the second."""
        (start, first), (now, step) = self._history[0], self._history[-1]
        return (now - start) / (step - first) * (self.total - step) if step > first else math.inf

    def _draw(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width] + "\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _format(self, step: int, fields: Mapping[str, float | str]) -> str:
        share = step / max(self.total, 1)
        bar = ("=" * int(20 * share) + ">").ljust(20)[:20]
        left = self.eta()
        shown = [f"ETA {datetime.timedelta(seconds=round(left))}" if math.isfinite(left) else "ETA -"]
        shown += [f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in fields.items()]
        return "  ".join([f"{self._description} [{bar}] {step}/{self.total}".strip(), *shown])
