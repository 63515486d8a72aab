"""Resampling along one axis as a matrix, on the host: what position tables, score maps and frames are resized by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Kernel = tuple[Callable[[np.ndarray], np.ndarray], int]  # weight by distance in source pixels, and its reach


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0.0)


def _cubic(distance: np.ndarray) -> np.ndarray:
    t, a = np.abs(distance), -0.75
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


LINEAR: Kernel = (_linear, 1)
CUBIC: Kernel = (_cubic, 2)  # a = -0.75, torch's choice (Keys 1981 recommends -0.5)


def resample_matrix(places: np.ndarray, size: int, kernel: Kernel) -> np.ndarray:
    """Weights [targets, size], float64, of the source pixels for each target; no antialiasing, edges repeated.

    `places` [targets]: where each target lies, in source pixels; pixel i is at i.
    """
    weight, reach = kernel
    first, targets = np.floor(places).astype(int), np.arange(len(places))
    matrix = np.zeros((len(places), size))
    for tap in range(1 - reach, 1 + reach):
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(matrix, (targets, column), weight(places - (first + tap)))
    return matrix
