"""Draws a protocol's results: rows of tiles in one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image

from dino_jax.data.storage import write_atomically
from dino_jax.eval.images import palette, resize

__all__ = ["GRAY", "GREEN", "ORANGE", "RED", "SHOWN", "palette", "save_rows", "tile", "tinted"]

GREEN, RED, GRAY, ORANGE = (60, 180, 75), (230, 50, 40), (150, 150, 150), (245, 160, 30)
SHOWN = 6  # rows per drawing


def tile(pixels: np.ndarray, side: int, frame: Sequence[int] | None = None) -> np.ndarray:
    """Fits an image uint8 [H, W, C] in a white square uint8 [side, side, 3], with border color `frame`."""
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    border = 0 if frame is None else max(2, side // 24)
    inner = side - 2 * border
    scale = inner / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    canvas = np.full((side, side, 3), 255 if frame is None else frame, np.uint8)
    canvas[border : side - border, border : side - border] = 255
    top, left = border + (inner - height) // 2, border + (inner - width) // 2
    canvas[top : top + height, left : left + width] = resize(pixels, height, width, Image.Resampling.BILINEAR)
    return canvas


def tinted(pixels: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Blends label colors over an image uint8 [H, W, C], half and half; labels [H, W], 0 is left unchanged."""
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    mixed = pixels // 2 + colors[labels] // 2
    return np.where((labels > 0)[..., None], mixed, pixels).astype(np.uint8)


def save_rows(path: epath.PathLike, rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> None:
    """Writes rows of tiles uint8 [s, s, 3] as a PNG, with the first column set apart (process 0 only)."""
    if jax.process_index() != 0 or not rows:
        return
    side, columns = rows[0][0].shape[0], max(map(len, rows))
    canvas = np.full((len(rows) * (side + gap) + gap, columns * (side + gap) + 3 * gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, piece in enumerate(row):
            top, left = gap + i * (side + gap), gap + j * (side + gap) + (2 * gap if j else 0)
            canvas[top : top + side, left : left + side] = piece
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
