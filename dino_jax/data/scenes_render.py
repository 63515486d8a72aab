"""Shapes, textures and the painter behind `scenes`: NumPy for the colours, PIL for the polygons.

A scene is described without pixels: lengths are in units of sqrt(height * width), centres are fractions of the picture.
So the same scene can be painted at any size. x points right, y down.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Outline = tuple[np.ndarray, ...]  # closed polygons, float [n, 2] of (x, y): the first is filled, the others are its holes

SUPERSAMPLE = 8  # subpixels per pixel side when a polygon's coverage is measured


class Pattern(NamedTuple):
    """A two-tone texture: which, and where it lies in the frame of the thing that wears it."""

    texture: str  # a key of TEXTURES
    frequency: float  # periods per unit length
    angle: float  # radians
    phase: np.ndarray  # float [2], periods, within +-0.5
    cell: int  # which part of the noise table, for the random textures
    colours: np.ndarray  # float [2, 3] in 0..1


class Piece(NamedTuple):
    """A textured polygon. A point p of the outline lies at `centre + matrix @ p`."""

    outline: Outline  # area 1, centroid 0
    matrix: np.ndarray  # float [2, 2]: rotation, shear, aspect, scale
    centre: np.ndarray  # float [2], fractions of (width, height)
    pattern: Pattern
    owner: int  # value in the index mask: 0 for clutter


class Background(NamedTuple):
    """Multi-octave noise between two colours under a faint pattern that a soft blob mask lets through."""

    colours: np.ndarray  # float [2, 3] in 0..1
    ramp: np.ndarray  # float [2]: slope of the mixture over the picture
    octaves: tuple[np.ndarray, ...]  # float32 lattices, coarse to fine
    blobs: np.ndarray  # float32 lattice: where the pattern shows
    pattern: Pattern


class Scene(NamedTuple):
    """All that is needed to paint a picture, painted in order."""

    background: Background
    pieces: tuple[Piece, ...]  # back to front
    light: np.ndarray  # float [2]: direction and strength of the light
    noise: float  # standard deviation of the pixel noise, in 0..1
    noise_seed: int


# ---------------------------------------------------------------------------------------------------------- shapes


def _polar(radius: np.ndarray, start: float = 0.0) -> np.ndarray:
    angle = start + 2 * np.pi * np.arange(len(radius)) / len(radius)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _star(rng: np.random.Generator) -> Outline:
    return (_polar(np.tile([1.0, rng.uniform(0.4, 0.52)], 5)),)


def _ring(rng: np.random.Generator) -> Outline:
    return _polar(np.ones(48)), _polar(np.full(32, rng.uniform(0.42, 0.58)))


def _crescent(rng: np.random.Generator) -> Outline:
    # The unit disk less a disk of radius r about (shift, 0): two arcs between the points where the circles meet.
    r, shift = rng.uniform(0.75, 0.9), rng.uniform(0.5, 0.62)
    x = (1 - r * r + shift * shift) / (2 * shift)
    outer, inner = math.acos(x), math.atan2(math.sqrt(1 - x * x), x - shift)
    a = np.linspace(outer, 2 * np.pi - outer, 40)
    b = np.linspace(2 * np.pi - inner, inner, 32)
    return (np.concatenate([np.stack([np.cos(a), np.sin(a)], 1), np.stack([shift + r * np.cos(b), r * np.sin(b)], 1)]),)


def _gear(rng: np.random.Generator) -> Outline:
    return (_polar(np.tile(np.array([1.0, 1.0, 0.7, 0.7]), rng.integers(7, 10))),)


def _cross(rng: np.random.Generator) -> Outline:
    w = rng.uniform(0.27, 0.38)
    arm = np.array([[1, -w], [1, w], [w, w]])
    turn = np.array([[0, 1], [-1, 0]])
    return (np.concatenate([arm, arm @ turn, arm @ turn @ turn, arm @ turn.T]),)


def _hexagon(rng: np.random.Generator) -> Outline:
    return (_polar(rng.uniform(0.93, 1.07, 6)),)


def _heart(rng: np.random.Generator) -> Outline:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    lobe = rng.uniform(4, 6)
    return (np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + lobe * np.cos(2 * a) + 2 * np.cos(3 * a)], 1),)


def _leaf(rng: np.random.Generator) -> Outline:
    x = np.linspace(-1, 1, 24)
    half = rng.uniform(0.42, 0.58) * (1 - x * x) * (1 - 0.35 * x)
    return (np.concatenate([np.stack([x, half], 1), np.stack([x, -half], 1)[-2:0:-1]]),)


def _arrow(rng: np.random.Generator) -> Outline:
    neck, shaft = rng.uniform(-0.1, 0.15), rng.uniform(0.24, 0.34)
    half = np.array([[-1, shaft], [neck, shaft], [neck, 0.85]])
    return (np.concatenate([half, [[1, 0]], (half * [1, -1])[::-1]]),)


def _spiral(rng: np.random.Generator) -> Outline:
    a = np.linspace(0, rng.uniform(3.4, 4.0) * np.pi, 72)[:, None]
    ray = np.concatenate([np.cos(a), np.sin(a)], 1)
    middle, half = 0.12 + 0.068 * a, 0.125
    return (np.concatenate([(middle + half) * ray, ((middle - half) * ray)[::-1]]),)


def _bolt(rng: np.random.Generator) -> Outline:
    lean = rng.uniform(-0.1, 0.1)
    half = np.array([[0.45 + lean, -1.0], [-0.6, 0.15], [-0.1, 0.15]])
    return (np.concatenate([half, -half]),)


def _flower(rng: np.random.Generator) -> Outline:
    petals = rng.integers(5, 8)
    a = 2 * np.pi * np.arange(72) / 72
    return (_polar(1 + rng.uniform(0.25, 0.4) * np.cos(petals * a)),)


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
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


def fragment(rng: np.random.Generator) -> Outline:
    """A random polygon of 3 to 7 corners: clutter."""
    return (_polar(rng.uniform(0.5, 1.3, rng.integers(3, 8))),)


def polygon_area(polygon: np.ndarray) -> float:
    """Area of a closed polygon [n, 2], by the shoelace formula."""
    after = np.roll(polygon, -1, 0)
    return abs(float(np.sum(polygon[:, 0] * after[:, 1] - polygon[:, 1] * after[:, 0]))) / 2


def normalise(outline: Outline) -> Outline:
    """The outline moved and scaled to centroid 0 and area 1, holes counted: no class is larger or off centre."""
    moments = []
    for polygon in outline:
        after = np.roll(polygon, -1, 0)
        cross = polygon[:, 0] * after[:, 1] - polygon[:, 1] * after[:, 0]
        sign = 1 if cross.sum() > 0 else -1
        moments.append(sign * np.append((polygon + after).T @ cross / 6, cross.sum() / 2))
    x, y, area = moments[0] - sum(moments[1:], np.zeros(3))
    return tuple((polygon - np.array([x, y]) / area) / math.sqrt(area) for polygon in outline)


# -------------------------------------------------------------------------------------------------------- textures
# A texture maps float32 coordinates (x, y), in periods, to a field whose zero set divides the plane into two equal parts and
# whose slope there is about 1, so that `clip(0.5 + field / pixel, 0, 1)` is an antialiased two-tone texture.


def _wave(x: np.ndarray) -> np.ndarray:
    return 0.25 - np.abs(x - np.floor(x) - 0.5)


@functools.cache
def _noise_table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)


def _noise(x: np.ndarray, y: np.ndarray, cell: int) -> np.ndarray:
    """Value noise on the integer lattice, bilinear."""
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    column, row = x0.astype(np.int32) + cell, y0.astype(np.int32) + cell // 64
    table, left, right, up, down = _noise_table(), column & 63, (column + 1) & 63, (row & 63) * 64, ((row + 1) & 63) * 64
    flat = table.ravel()
    top = flat[up + left] * (1 - fx) + flat[up + right] * fx
    return top * (1 - fy) + (flat[down + left] * (1 - fx) + flat[down + right] * fx) * fy


def _stripes(x, y, cell):
    return _wave(x)


def _checker(x, y, cell):
    return 4 * _wave(x) * _wave(y)


def _dots(x, y, cell):
    return math.sqrt(0.5 / math.pi) - np.hypot(x - np.floor(x) - 0.5, y - np.floor(y) - 0.5)


def _speckle(x, y, cell):
    return 0.15 * _noise(3.5 * x, 3.5 * y, cell)


def _zigzag(x, y, cell):
    return 0.7 * _wave(x + np.abs(y - 2 * np.floor(y / 2) - 1))


def _triangles(x, y, cell):
    p, q = x, -0.5 * x + math.sqrt(0.75) * y
    a, b, c = p - np.floor(p), q - np.floor(q), -p - q - np.floor(-p - q)
    return np.where(a + b + c < 1.5, np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c) - 1)


def _bricks(x, y, cell):
    row = np.floor(y)
    along = x / 2 + row / 2
    along = 1 - 2 * np.abs(along - np.floor(along) - 0.5)
    return np.minimum(along, 0.5 - np.abs(y - row - 0.5)) - 0.191


def _rings(x, y, cell):
    return _wave(np.hypot(x, y))


def _grid(x, y, cell):
    return 0.354 - np.maximum(np.abs(x - np.floor(x) - 0.5), np.abs(y - np.floor(y) - 0.5))


def _halves(x, y, cell):
    return y


def _blotches(x, y, cell):
    return 0.5 * _noise(0.8 * x, 0.8 * y, cell)


def _rays(x, y, cell):
    sectors = 12 / (2 * math.pi)
    return _wave(np.arctan2(y, x) * sectors) * np.hypot(x, y) / sectors


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "speckle": _speckle,
    "zigzag": _zigzag,
    "triangles": _triangles,
    "bricks": _bricks,
    "rings": _rings,
    "grid": _grid,
    "halves": _halves,
    "blotches": _blotches,
    "rays": _rays,
}


def _tone(pattern: Pattern, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Share of the second colour, float32 [h, w], at the coordinates x, y; `pixel` is a pixel's length there."""
    c, s = pattern.frequency * math.cos(pattern.angle), pattern.frequency * math.sin(pattern.angle)
    px, py = pattern.phase
    field = TEXTURES[pattern.texture](c * x - s * y + float(px), s * x + c * y + float(py), pattern.cell)
    return np.clip(field * (1 / (pixel * pattern.frequency)) + 0.5, 0, 1)


# --------------------------------------------------------------------------------------------------------- painting


def coverage(outline: Outline, matrix: np.ndarray, centre: np.ndarray, height: int, width: int):
    """What a piece covers: its window (two slices) and the covered share of each pixel, float32 [h, w]; None if unseen.

    matrix: local units to pixels. centre: pixels.
    """
    polygons = [polygon @ matrix.T + centre for polygon in outline]
    low = np.maximum(np.floor(polygons[0].min(0)), 0).astype(int)
    high = np.minimum(np.ceil(polygons[0].max(0)), (width, height)).astype(int)
    w, h = (high - low).tolist()
    if w <= 0 or h <= 0:
        return None
    stencil = Image.new("L", (w * SUPERSAMPLE, h * SUPERSAMPLE))
    draw = ImageDraw.Draw(stencil)
    for k, polygon in enumerate(polygons):
        corners = np.rint((polygon - low) * SUPERSAMPLE - 0.5)
        draw.polygon(corners.ravel().tolist(), fill=0 if k else 255)
    share = np.asarray(stencil.reduce(SUPERSAMPLE), np.float32) * np.float32(1 / 255)
    return (slice(low[1], high[1]), slice(low[0], high[0])), share


def _paint_background(background: Background, height: int, width: int) -> np.ndarray:
    unit = math.sqrt(height * width)
    x, y = (np.arange(n, dtype=np.float32) / unit for n in (width, height))
    x, y = (x - x.mean())[None], (y - y.mean())[:, None]
    mixture = 0.5 + background.ramp[0] * x + background.ramp[1] * y
    for lattice in background.octaves:
        mixture = mixture + _enlarge(lattice, height, width)
    first, second = background.colours
    canvas = first + (second - first) * np.clip(mixture, 0, 1)[:, :, None]
    shown = np.clip(_enlarge(background.blobs, height, width), 0, 1)
    tone = _tone(background.pattern, x, y, 1 / unit)
    first, second = background.pattern.colours
    canvas += shown[:, :, None] * (first + (second - first) * tone[:, :, None] - canvas)
    return canvas


def _enlarge(lattice: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC))


def _paint(canvas: np.ndarray, owner: np.ndarray, piece: Piece, light: np.ndarray) -> None:
    height, width = owner.shape
    unit = math.sqrt(height * width)
    matrix, centre = piece.matrix * unit, piece.centre * (width, height)
    seen = coverage(piece.outline, matrix, centre, height, width)
    if seen is None:
        return
    window, share = seen
    rows, columns = window
    dx = (np.arange(columns.start, columns.stop) + (0.5 - centre[0])).astype(np.float32)[None]
    dy = (np.arange(rows.start, rows.stop) + (0.5 - centre[1])).astype(np.float32)[:, None]
    (a, b), (c, d) = np.linalg.inv(matrix).tolist()
    size = math.sqrt(abs(float(np.linalg.det(matrix))))  # pixels per local unit
    tone = _tone(piece.pattern, a * dx + b * dy, c * dx + d * dy, 1 / size)
    shade = 1 + float(light[0] / size) * dx + float(light[1] / size) * dy
    first, second = piece.pattern.colours
    colour = (first + (second - first) * tone[:, :, None]) * shade[:, :, None]
    canvas[window] += share[:, :, None] * (colour - canvas[window])
    owner[window][share >= 0.5] = piece.owner


def render(scene: Scene, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and who owns each pixel, uint8 [H, W]: the `owner` of the front-most piece there."""
    canvas = _paint_background(scene.background, height, width)
    owner = np.zeros((height, width), np.uint8)
    for piece in scene.pieces:
        _paint(canvas, owner, piece, scene.light)
    grain = np.random.default_rng(scene.noise_seed).standard_normal((height, width), dtype=np.float32)
    canvas += (np.float32(scene.noise) * grain)[:, :, None]
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8), owner
