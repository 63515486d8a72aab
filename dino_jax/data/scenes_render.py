"""The textures and the painter behind `scenes`: NumPy for the colors, PIL for the polygons.

A scene is described without pixels: lengths are in units of sqrt(height * width), centers are fractions of the image.
So a scene can be painted at any size. x points right, y down.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .scenes_shapes import Outline

SUPERSAMPLE = 8  # subpixels per pixel side when a polygon's coverage is measured


class Pattern(NamedTuple):
    """A two-tone texture and its place in the coordinates of its piece."""

    texture: str  # a key of TEXTURES
    frequency: float  # periods per unit length
    angle: float  # radians
    phase: tuple[float, float]  # periods, within +-0.5
    cell: int  # which part of the noise table, for the random textures
    colors: np.ndarray  # float32 [2, 3, 1, 1] in 0..1


class Piece(NamedTuple):
    """A textured polygon. A point p of the outline lies at `center + matrix @ p`."""

    outline: Outline  # area 1, centroid 0
    matrix: np.ndarray  # float [2, 2]: rotation, shear, aspect, scale
    center: tuple[float, float]  # fractions of (width, height)
    pattern: Pattern
    owner: int  # value in the object mask: 0 for clutter


class Background(NamedTuple):
    """Multi-octave noise between two colors, under a faint pattern that shows through a soft blob mask."""

    colors: np.ndarray  # float32 [2, 3, 1, 1] in 0..1
    ramp: tuple[float, float]  # slope of the mixture over the image
    noise: np.ndarray  # float32 lattice, added to the mixture
    blobs: np.ndarray  # float32 lattice: where the pattern shows
    pattern: Pattern


class Scene(NamedTuple):
    """The description of an image."""

    background: Background
    pieces: tuple[Piece, ...]  # back to front
    light: tuple[float, float]  # direction and strength of the light
    noise: float  # standard deviation of the pixel noise, in 0..1
    noise_seed: int


# -------------------------------------------------------------------------------------------------------- textures
# A texture maps float32 coordinates (x, y), in periods, to a field whose zero set halves the plane and whose slope
# there is about 1, so that `clip(0.5 + field / pixel, 0, 1)` is an antialiased two-tone texture.


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
    left, right, up, down = column & 63, (column + 1) & 63, (row & 63) * 64, ((row + 1) & 63) * 64
    table = _noise_table().ravel()
    top = table[up + left] * (1 - fx) + table[up + right] * fx
    return top * (1 - fy) + (table[down + left] * (1 - fx) + table[down + right] * fx) * fy


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


def _blend(pattern: Pattern, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """The pattern's color, float32 [3, h, w], at the coordinates x, y; `pixel` is a pixel's side there."""
    c, s = pattern.frequency * math.cos(pattern.angle), pattern.frequency * math.sin(pattern.angle)
    field = TEXTURES[pattern.texture](
        c * x + (pattern.phase[0] - s * y), s * x + (pattern.phase[1] + c * y), pattern.cell
    )
    field *= 1 / (pixel * pattern.frequency)
    field += 0.5
    return _mix(pattern.colors, field)


def _mix(colors: np.ndarray, share: np.ndarray) -> np.ndarray:
    """From the first color, at share <= 0, to the second, at share >= 1: float32 [3, h, w]."""
    return colors[0] + (colors[1] - colors[0]) * np.minimum(np.maximum(share, 0), 1)


# --------------------------------------------------------------------------------------------------------- painting


def coverage(
    outline: Outline, matrix: np.ndarray, center: np.ndarray, height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """What a piece covers: its window (two slices) and the covered share of each pixel, float32 [h, w]; None if unseen.

    matrix: local units to pixels. center: pixels.
    """
    polygons = [polygon @ matrix.T + center for polygon in outline]
    (left, top), (right, bottom) = polygons[0].min(0).tolist(), polygons[0].max(0).tolist()
    left, top = max(math.floor(left), 0), max(math.floor(top), 0)
    right, bottom = min(math.ceil(right), width), min(math.ceil(bottom), height)
    if right <= left or bottom <= top:
        return None
    stencil = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    draw = ImageDraw.Draw(stencil)
    for k, polygon in enumerate(polygons):
        corners = np.rint((polygon - (left, top)) * SUPERSAMPLE - 0.5)
        draw.polygon(corners.ravel().tolist(), fill=0 if k else 255)
    share = np.asarray(stencil.reduce(SUPERSAMPLE), np.float32) * np.float32(1 / 255)
    return (slice(top, bottom), slice(left, right)), share


def enlarge(lattice: np.ndarray, height: int, width: int) -> np.ndarray:
    """A smooth float32 field [height, width] through the lattice, bicubic."""
    return np.asarray(Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC))


def _paint_background(background: Background, height: int, width: int) -> np.ndarray:
    unit = math.sqrt(height * width)
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2)[None] / unit
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None] / unit
    mixture = background.ramp[0] * x + (background.ramp[1] * y + 0.5)
    mixture += enlarge(background.noise, height, width)
    canvas = _mix(background.colors, mixture)
    shown = np.clip(enlarge(background.blobs, height, width), 0, 1)
    canvas += shown * (_blend(background.pattern, x, y, 1 / unit) - canvas)
    return canvas


def _paint(canvas: np.ndarray, owner: np.ndarray, piece: Piece, light: tuple[float, float]) -> None:
    height, width = owner.shape
    matrix = piece.matrix * math.sqrt(height * width)
    x, y = piece.center[0] * width, piece.center[1] * height
    seen = coverage(piece.outline, matrix, np.array([x, y]), height, width)
    if seen is None:
        return
    (rows, columns), share = seen
    dx = np.arange(columns.start + 0.5 - x, columns.stop - x, dtype=np.float32)[None]
    dy = np.arange(rows.start + 0.5 - y, rows.stop - y, dtype=np.float32)[:, None]
    (a, b), (c, d) = matrix.tolist()
    det = a * d - b * c
    size = math.sqrt(abs(det))  # pixels per local unit
    color = _blend(piece.pattern, dx * (d / det) - dy * (b / det), dy * (a / det) - dx * (c / det), 1 / size)
    color *= dx * (light[0] / size) + (dy * (light[1] / size) + 1)
    under = canvas[:, rows, columns]
    under += share * (color - under)
    owner[rows, columns][share >= 0.5] = piece.owner


def render(scene: Scene, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 [H, W, 3], and the `owner` of each pixel's front-most piece, uint8 [H, W]."""
    canvas = _paint_background(scene.background, height, width)  # [3, H, W]
    owner = np.zeros((height, width), np.uint8)
    for piece in scene.pieces:
        _paint(canvas, owner, piece, scene.light)
    canvas *= 255
    grain = np.random.Generator(np.random.SFC64(scene.noise_seed)).standard_normal((height, width), dtype=np.float32)
    canvas += grain * (255 * scene.noise) + 0.5
    image = np.minimum(np.maximum(canvas, 0, out=canvas), 255, out=canvas).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), owner
