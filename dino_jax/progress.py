"""The progress bar of every long task: tqdm with one look, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from dino_jax.errors import printable

T = TypeVar("T")
LOOK = "{desc} [{bar:20}] {n_fmt}/{total_fmt}  ETA {remaining}, {rate_noinv_fmt}{postfix}"


class Progress:
    """A progress bar: one redrawn line on a terminal; in a log, a plain line every `interval` and at the end.

        train [=========>          ] 1200/2500  ETA 12:30,  1.73 steps/s, epoch 4.8, loss 5.312

    Args:
        total: steps at the end; None: not known.
        initial: steps done before.
        description: the first word of the line.
        unit: what a step is, in the rate; "B": bytes, shown as kB, MB or GB.
        active: False: silent, as on every process except 0.
        interval: seconds between lines if the stream is not a terminal.
        stream: standard error unless given.
    """

    def __init__(
        self,
        total: int | None,
        initial: int = 0,
        description: str = "",
        *,
        unit: str = "steps",
        active: bool = True,
        interval: float = 30.0,
        stream: TextIO | None = None,
    ):
        self._stream = _Quiet(stream or sys.stderr)
        self._live = self._stream.isatty()
        self._options: dict[str, Any] = {
            "total": total,
            "desc": printable(description),
            "unit": unit if unit == "B" else f" {unit}",
            "unit_scale": unit == "B",
            "file": self._stream,
            "leave": self._live,
            "disable": not active,
            "mininterval": 0.1 if self._live else interval,
            "miniters": 0,  # only time decides
            "delay": 0 if self._live else 1e-9,  # in a log, no line before the first interval is over
            "bar_format": LOOK,
            "ascii": " >=",
            "dynamic_ncols": True,
        }
        self._bar = self._open(initial)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, **fields: float | str) -> None:
        """Sets the steps done; `fields` are shown after the rate. Cheap: most calls draw nothing."""
        if step < self._bar.n:  # a rewind: the rate starts again
            self._bar.leave = False
            self._bar.close()
            self._bar = self._open(step)
        texts = (f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in fields.items())
        self._bar.set_postfix_str(", ".join(texts), refresh=False)
        self._bar.update(step - self._bar.n)
        if step == self._bar.total:
            self._bar.refresh()

    def note(self, line: str) -> None:
        """Prints a separate line above the bar."""
        line = printable(line)
        if self._bar.disable:
            return
        line = printable(line)
        if self._live:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def close(self) -> None:
        """Leaves the last state of the bar on its line."""
        self._bar.close()

    def _open(self, initial: int) -> tqdm:
        return (tqdm if self._live else _Lines)(initial=initial, **self._options)


class _Quiet:
    """A text stream that drops what it cannot write: a closed terminal, pipe or stderr must not end a task."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)  # type: ignore[union-attr]

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()  # type: ignore[union-attr]

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lines(tqdm):
    """tqdm for a log: every state is a line, printed once."""

    monitor_interval = 0  # no thread
    _shown: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n != self._shown:
            self._shown = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        if not self.disable:
            self.display()
        super().close()


def track(items: Iterable[T], description: str, *, unit: str = "images", active: bool = True) -> Iterator[T]:
    """Yields the items, with a bar that counts those that are done."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(total, 0, description, unit=unit, active=active) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)
