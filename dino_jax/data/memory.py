"""Reused memory for the pixels of batches.

Allocating fresh pages costs more than writing pixels to them, above all with many threads. So a batch's memory is
reused once no array holds it. Threads of one process write their chunks straight into the batch; chunks from other
processes are copied there once.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Pixels = dict[str, np.ndarray]  # name -> uint8 [rows, ...]


class BatchMemory:
    """The pixel arrays of batches and of the chunks that make them.

    Args:
      layout: name -> shape of one row.
      rows: of a batch.
      parts: chunks that a batch is made of.
      together: whether the chunks of a batch are made in this process, and so can share the batch's memory.
    """

    def __init__(self, layout: Mapping[str, tuple[int, ...]], rows: int, parts: int, together: bool):
        self.layout, self.rows, self.parts, self.together = layout, rows, parts, together
        self._begun: dict[int, Pixels] = {}  # by the batch's number
        self._free: dict[int, list[np.ndarray]] = {}  # by size
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchMemory, (self.layout, self.rows, self.parts, self.together)

    @property
    def row_bytes(self) -> int:
        """Size of one row of every array."""
        return sum(map(math.prod, self.layout.values()))

    def part_rows(self, part: int) -> slice:
        """The rows of a batch that its chunk number `part` holds."""
        return slice(part * self.rows // self.parts, (part + 1) * self.rows // self.parts)

    def chunk(self, batch: int, part: int) -> Pixels:
        """The arrays [rows of the part, ...] for one chunk; their content is old."""
        rows = self.part_rows(part)
        if not self.together:
            return self._take(rows.stop - rows.start)
        with self._lock:
            if batch not in self._begun:
                self._begun[batch] = self._take(self.rows)
            return {name: array[rows] for name, array in self._begun[batch].items()}

    def whole(self, batch: int, chunks: Sequence[Pixels]) -> Pixels:
        """The arrays [rows, ...] of a batch whose chunks are complete."""
        if self.together:
            with self._lock:
                return self._begun.pop(batch)
        if len(chunks) == 1:
            return chunks[0]
        arrays = self._take(self.rows)
        for name, array in arrays.items():
            np.concatenate([chunk[name] for chunk in chunks], out=array)
        return arrays

    def _take(self, rows: int) -> Pixels:
        return {name: self._array((rows, *shape)) for name, shape in self.layout.items()}

    def _array(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array whose memory is reused once neither it nor a view of it exists."""
        free = self._free.setdefault(math.prod(shape), [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(math.prod(shape), np.uint8)
        array = np.frombuffer(memory.data, np.uint8)  # views keep this one alive: its own base is no array
        weakref.finalize(array, free.append, memory).atexit = False
        return array.reshape(shape)
