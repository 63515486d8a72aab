"""Keeps Orbax's tracebacks off the terminal, where the error itself becomes one line.

Orbax logs every error of its threads with a traceback. asyncio does so for tasks that nobody asked, and TensorStore's
threads for tasks that Orbax has given up.
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
    """Drops these tracebacks until as many calls of `end`."""
    global _users, _before
    if _users == 0:
        _before, sys.unraisablehook = sys.unraisablehook, _unraisable
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_other)
    _users += 1


def end() -> None:
    """Undoes one `begin`. To be left out after an error: threads may report it up to seconds later."""
    global _users
    _users -= 1
    if _users == 0:
        if sys.unraisablehook is _unraisable:
            sys.unraisablehook = _before
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(_is_other)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`begin`, and `end` unless there is an error."""
    begin()
    yield
    end()


def _is_other(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname + record.getMessage()


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if str(lost.exc_value) != "Event loop is closed":
        _before(lost)
