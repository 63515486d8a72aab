"""Resampling along one axis as a matrix, on the host: what position tables, score maps and frames are resized by."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

Kernel = tuple[Callable[[np.ndarray], np.ndarray], int]  # weight by distance in source pixels, and its reach


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0.0)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(distance)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


LINEAR: Kernel = (_linear, 1)
CUBIC: Kernel = (functools.partial(_cubic, a=-0.75), 2)  # torch's choice without antialiasing
KEYS: Kernel = (functools.partial(_cubic, a=-0.5), 2)  # Keys 1981; torch's choice with antialiasing, and PIL's


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


def shrink_matrix(source: int, target: int, kernel: Kernel) -> np.ndarray:
    """Weights [target, source], float64, of a resize with half-pixel centers, antialiased when it shrinks.

    The kernel is stretched over max(source / target, 1) source pixels; beyond an edge there is nothing, and each row
    is normalized to 1.
    """
    weight, reach = kernel
    scale = source / target
    stretch = max(scale, 1.0)
    places = (np.arange(target) + 0.5) * scale - 0.5
    distance = (np.arange(source)[None, :] - places[:, None]) / stretch
    matrix = np.where(np.abs(distance) < reach, weight(distance), 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)
