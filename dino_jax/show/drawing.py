"""Draws attention maps (paper, figures 1 and 3; official `visualize_attention.py`).

Legend: h, w rows and columns of patches; H, W of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# Anchors of a perceptually ordered color map, dark to light (matplotlib's "magma", sampled at eighths).
_ANCHORS = np.array(
    [
        (0, 0, 4),
        (29, 17, 71),
        (81, 18, 124),
        (131, 38, 129),
        (183, 55, 121),
        (230, 81, 98),
        (251, 135, 97),
        (254, 194, 135),
        (252, 253, 191),
    ],
    np.float64,
)


def heat(values: np.ndarray) -> np.ndarray:
    """Heat map of float [h, w] as uint8 [h, w, 3]: minimum dark, maximum light."""
    span = np.ptp(values)
    place = (values - values.min()) / (span if span > 0 else 1.0) * (len(_ANCHORS) - 1)
    grid = np.arange(len(_ANCHORS))
    channels = [np.interp(place, grid, _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, color: Sequence[int] = (255, 220, 0)) -> np.ndarray:
    """Darkens an image uint8 [H, W, 3] outside a boolean mask [H, W] and draws the mask's edge."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    result = np.where(mask[..., None], image, image // 3)
    result[mask & ~inside] = color
    return result


def nearest(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes [h, w] or [h, w, 3] to [side, side(, 3)] by nearest neighbor."""
    rows = np.arange(side) * image.shape[0] // side
    columns = np.arange(side) * image.shape[1] // side
    return image[rows[:, None], columns]


def table(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], side: int = 128) -> np.ndarray:
    """A grid of images uint8 [h, w, 3], each scaled to `side` pixels square, with column titles: uint8 [H, W, 3]."""
    gap, header = 4, 18
    height = header + len(rows) * (side + gap)
    width = len(titles) * (side + gap) + gap
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), 3), title, fill="black")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = Image.fromarray(nearest(image, side))
            canvas.paste(tile, (gap + column * (side + gap), header + row * (side + gap)))
    return np.asarray(canvas)
