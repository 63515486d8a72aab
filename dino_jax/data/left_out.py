"""Files that are left out because their suffix is not one of images: counted by suffix, and named once."""

from __future__ import annotations

import collections
import os

from dino_jax.errors import printable

SIDECARS = frozenset(  # suffixes of files that accompany images: nobody expects images in them
    (
        *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".log"),
        *(".ini", ".cfg", ".db", ".lst", ".list", ".py", ".sh", ".cls", ".label", ".class", ".__key__"),
    )
)
SHOWN = 5  # suffixes in a message


class LeftOut:
    """Counts what a source does not read, by suffix, with the first name of each."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}

    def add(self, name: str, suffix: str | None = None) -> None:
        """Counts a file. `suffix`: what it is counted as, by default what follows the last dot."""
        suffix = os.path.splitext(name)[1].lower() if suffix is None else suffix
        self._counts[suffix] += 1
        self._first.setdefault(suffix, name)

    def text(self, everything: bool = False) -> str:
        """`3 files (.heic 2, without suffix 1), such as a/b.heic`, or "". Sidecars count only with `everything`."""
        counts = {suffix: n for suffix, n in self._counts.items() if everything or suffix not in SIDECARS}
        if not counts:
            return ""
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        kinds = [f"{printable(suffix[:20]) or 'without suffix'} {count}" for suffix, count in ordered[:SHOWN]]
        if len(ordered) > SHOWN:
            kinds.append(f"{len(ordered) - SHOWN} other suffixes {sum(count for _, count in ordered[SHOWN:])}")
        total = sum(counts.values())
        files = f"{total} file{'s' * (total > 1)}"
        return f"{files} ({', '.join(kinds)}), such as {printable(self._first[ordered[0][0]])}"
