"""The one record that every source yields."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """An image as a source stores it.

    image: encoded bytes, or uint8 [H, W, C]. label: class index, -1 where unknown. name: unique and readable.
    """

    image: bytes | np.ndarray
    label: int
    name: str
