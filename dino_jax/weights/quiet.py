"""Hides Orbax's tracebacks; the error itself is reported in one line.

Orbax logs a traceback for every error in its threads. So do asyncio for tasks never awaited, and TensorStore's threads
for tasks that Orbax abandoned.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

LOGGERS = ("absl", "asyncio")

_users = 0
_before = sys.unraisablehook


def begin() -> None:
    """Hides the tracebacks until a matching `end`."""
    global _users, _before
    if _users == 0:
        _before, sys.unraisablehook = sys.unraisablehook, _unraisable
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_other)
    _users += 1


def end() -> None:
    """Undoes one `begin`. Do not call after an error: threads may log it seconds later."""
    global _users
    _users -= 1
    if _users == 0:
        if sys.unraisablehook is _unraisable:
            sys.unraisablehook = _before
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(_is_other)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`begin`, then `end` unless there is an error."""
    begin()
    yield
    end()


def _is_other(record: logging.LogRecord) -> bool:
    text = record.pathname + record.getMessage()
    return record.levelno < logging.ERROR or not any(name in text for name in ("orbax", "tensorstore"))


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if str(lost.exc_value) != "Event loop is closed":
        _before(lost)
