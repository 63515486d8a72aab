"""The outlines that `scenes` paints: a family of polygons for each class, and random fragments for clutter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

Outline = tuple[np.ndarray, ...]  # closed polygons, float [n, 2] of (x, y): the first is filled, the others are holes


class Dice:
    """Uniform random numbers, drawn from a generator in bulk."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._left: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        if not self._left:
            self._left = self.rng.random(256).tolist()
        return low + (high - low) * self._left.pop()

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """A whole number, low <= n < high."""
        return math.floor(self.uniform(low, high))

    def sign(self) -> int:
        return 1 if self.uniform(-1, 1) > 0 else -1


@functools.cache
def _directions(corners: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _polar(radius: np.ndarray) -> np.ndarray:
    return radius[:, None] * _directions(len(radius))


def _star(dice: Dice) -> Outline:
    return (_polar(np.tile([1.0, dice.uniform(0.4, 0.52)], 5)),)


def _ring(dice: Dice) -> Outline:
    return _polar(np.ones(48)), _polar(np.full(32, dice.uniform(0.42, 0.58)))


def _crescent(dice: Dice) -> Outline:
    # The unit disk without a disk of radius r about (shift, 0): two arcs between the points where the circles meet.
    r, shift = dice.uniform(0.75, 0.9), dice.uniform(0.5, 0.62)
    x = (1 - r * r + shift * shift) / (2 * shift)
    outer, inner = math.acos(x), math.atan2(math.sqrt(1 - x * x), x - shift)
    a = np.linspace(outer, 2 * np.pi - outer, 40)
    b = np.linspace(2 * np.pi - inner, inner, 32)
    return (np.concatenate([np.stack([np.cos(a), np.sin(a)], 1), np.stack([shift + r * np.cos(b), r * np.sin(b)], 1)]),)


def _gear(dice: Dice) -> Outline:
    return (_polar(np.tile(np.array([1.0, 1.0, 0.7, 0.7]), dice.integer(7, 10))),)


def _cross(dice: Dice) -> Outline:
    w = dice.uniform(0.27, 0.38)
    arm = np.array([[1, -w], [1, w], [w, w]])
    turn = np.array([[0, 1], [-1, 0]])
    return (np.concatenate([arm, arm @ turn, arm @ turn @ turn, arm @ turn.T]),)


def _hexagon(dice: Dice) -> Outline:
    return (_polar(np.array([dice.uniform(0.93, 1.07) for _ in range(6)])),)


def _heart(dice: Dice) -> Outline:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    lobe = dice.uniform(4, 6)
    return (np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + lobe * np.cos(2 * a) + 2 * np.cos(3 * a)], 1),)


def _leaf(dice: Dice) -> Outline:
    x = np.linspace(-1, 1, 24)
    half = dice.uniform(0.42, 0.58) * (1 - x * x) * (1 - 0.35 * x)
    return (np.concatenate([np.stack([x, half], 1), np.stack([x, -half], 1)[-2:0:-1]]),)


def _arrow(dice: Dice) -> Outline:
    neck, shaft = dice.uniform(-0.1, 0.15), dice.uniform(0.24, 0.34)
    half = np.array([[-1, shaft], [neck, shaft], [neck, 0.85]])
    return (np.concatenate([half, [[1, 0]], (half * [1, -1])[::-1]]),)


def _spiral(dice: Dice) -> Outline:
    a = np.linspace(0, dice.uniform(3.4, 4.0) * np.pi, 72)[:, None]
    ray = np.concatenate([np.cos(a), np.sin(a)], 1)
    middle, half = 0.12 + 0.068 * a, 0.125
    return (np.concatenate([(middle + half) * ray, ((middle - half) * ray)[::-1]]),)


def _bolt(dice: Dice) -> Outline:
    lean = dice.uniform(-0.1, 0.1)
    half = np.array([[0.6 + lean, -1.1], [0.2 + lean, -1.1], [-0.7, 0.2], [-0.12, 0.2]])
    return (np.concatenate([half, -half]),)


def _flower(dice: Dice) -> Outline:
    petals = dice.integer(5, 8)
    a = 2 * np.pi * np.arange(72) / 72
    return (_polar(1 + dice.uniform(0.25, 0.4) * np.cos(petals * a)),)


SHAPES: dict[str, Callable[[Dice], Outline]] = {
    "star": _star,
    "ring": _ring,
    "crescent": _crescent,
    "gear": _gear,
    "cross": _cross,
    "hexagon": _hexagon,
    "heart": _heart,
    "leaf": _leaf,
    "arrow": _arrow,
    "spiral": _spiral,
    "bolt": _bolt,
    "flower": _flower,
}


def fragment(dice: Dice) -> Outline:
    """A random polygon of 3 to 7 corners: clutter."""
    return (_polar(np.array([dice.uniform(0.5, 1.3) for _ in range(dice.integer(3, 8))])),)


def moments(polygon: np.ndarray) -> np.ndarray:
    """The integrals of x, y and 1 over a closed polygon [n, 2], by the shoelace formula."""
    after = np.concatenate((polygon[1:], polygon[:1]))
    cross = polygon[:, 0] * after[:, 1] - polygon[:, 1] * after[:, 0]
    area = cross.sum() / 2
    return np.array([*(cross @ (polygon + after) / 6), area]) * (1 if area > 0 else -1)


def normalize(outline: Outline) -> Outline:
    """The outline moved and scaled to centroid 0 and area 1, holes counted: the same for every class."""
    x, y, area = moments(outline[0]) - sum(moments(hole) for hole in outline[1:])
    return tuple((polygon - (x / area, y / area)) / math.sqrt(area) for polygon in outline)
