"""The records of sources: `Example`, which each yields, and `Kind`, by which `sources.open_source` finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dino_jax.errors import UserError


class Example(NamedTuple):
    """An image as a source stores it.

    image: encoded bytes, or uint8 [H, W, C]. label: class index, -1 if unknown. name: unique and readable.
    """

    image: bytes | np.ndarray
    label: int
    name: str


def whole_labels(values: Any, where: str) -> np.ndarray:
    """Class labels as int32 [N]: whole numbers, of any numeric type, from -1 (unlabeled) on.

    Raises:
      UserError: another value, such as 0.7 or NaN, which no class has; the message begins with `where`.
    """
    labels = np.asarray(values)
    labels = labels.astype(np.int32) if labels.dtype == np.bool_ else labels
    if labels.dtype.kind in "iuf":
        inside = (labels == np.floor(labels)) & (labels >= -1) & (labels < 2**31)
        if inside.all():
            return labels.astype(np.int32)
        labels = labels[~inside]
    raise UserError(f"{where}: the label {labels.flat[0]!s} is not a class number (0, 1, 2, ...; -1: unlabeled)")


class Kind(NamedTuple):
    """A kind of source. A module `data/*_source.py` lists its own by prefix: `KINDS = {"list": Kind(ListSource)}`."""

    open: Callable[..., Any]  # (what follows the prefix, **options as strings) -> sources.Source
    options: tuple[str, ...] = ()  # what may follow "?"
