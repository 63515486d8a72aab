"""Counts the collectives in a compiled program's text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(text: str, trips: int = 1) -> dict[str, dict[str, int]]:
    """The collectives of one device's program: `{kind: {"count": n, "bytes": b}}`.

    `bytes` is the size of the whole array: an all-reduce's sum, an all-gather's result, a reduce-scatter's operand.
    Operations inside a loop's body count `trips` times.
    """
    found: dict[str, dict[str, int]] = {}
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    for computation, match in _operations(text):
        times = trips if computation in bodies else 1
        sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(match["result"])]
        size = sum(sizes)
        if match["start"] and match["kind"] in ("all-gather", "collective-permute"):  # (operands, results, ...)
            size = max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
        if match["kind"] == "reduce-scatter":
            size *= _group_size(text, match)
        entry = found.setdefault(match["kind"], {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * size
    return found


def _operations(text: str) -> Iterator[tuple[str, re.Match]]:
    """Yields each collective with the name of its computation."""
    computation, start = "", 0
    for line in text.splitlines(keepends=True):
        if heading := _COMPUTATION.match(line.rstrip()):
            computation = heading[1]
        if match := _OPERATION.search(text, start, start + len(line)):
            yield computation, match
        start += len(line)


def _group_size(text: str, match: re.Match) -> int:
    """The number of devices in a group of an operation."""
    line = text[match.end() : text.find("\n", match.end())]
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 1


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
