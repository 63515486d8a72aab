"""The records of sources: `Example`, which each yields, and `Kind`, by which `sources.open_source` finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """An image as a source stores it.

    image: encoded bytes, or uint8 [H, W, C]. label: class index, -1 where unknown. name: unique and readable.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Kind(NamedTuple):
    """A kind of source. A module `data/*_source.py` lists its own by prefix: `KINDS = {"list": Kind(ListSource)}`."""

    open: Callable[..., Any]  # (what follows the prefix, **options as strings) -> sources.Source
    options: tuple[str, ...] = ()  # what may follow "?"
