"""The version of what checkpoints and saved configurations hold, and the way up from older versions.

Every checkpoint and every saved configuration records its `format_version`; one without is of version 1. What they hold
is named entries: an array by item and path (`rest/center`), a configuration key by its dotted name
(`config.loss.student_temp`). A migration is a pure function from the entries of one version to those of the next. It
may rename and drop entries, and must leave an array in its item. The entries' values are not looked at, so the same
function serves arrays, shapes and settings.

To change what a checkpoint holds: append a function to `MIGRATIONS`, and add a small checkpoint of the version before
to `tests/data_old`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dino_jax.errors import UserError

Entries = dict[str, Any]


def _renamed(entries: Entries, patterns: Mapping[str, str]) -> Entries:
    """`entries` with each name rewritten by the first pattern that matches its beginning."""

    def name(old: str) -> str:
        for pattern, new in patterns.items():
            if re.match(pattern, old):
                return re.sub(pattern, new, old, count=1)
        return old

    return {name(old): value for old, value in entries.items()}


def _objectives_by_name(entries: Entries) -> Entries:
    """1 -> 2: a run has several objectives, each with its own state and its own group of configuration keys."""
    return _renamed(
        entries, {r"rest/center$": "rest/objectives/dino/center", r"config\.loss\.": "config.objective.dino."}
    )


MIGRATIONS: tuple[Callable[[Entries], Entries], ...] = (_objectives_by_name,)  # [v - 1]: from version v to v + 1
FORMAT_VERSION = len(MIGRATIONS) + 1


def migrate(entries: Mapping[str, Any], version: int, where: object) -> Entries:
    """The entries of `version` as this code has them.

    Raises:
      UserError: naming `where`, for a version that this code does not know.
    """
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{where}: has format version {version}, this code reads up to {FORMAT_VERSION}: "
            "update dino-jax to the version that wrote it"
        )
    entries = dict(entries)
    for migration in MIGRATIONS[version - 1 :]:
        entries = migration(entries)
    return entries
