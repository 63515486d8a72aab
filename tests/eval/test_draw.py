from __future__ import annotations

import numpy as np
from PIL import Image

from dino_jax.eval import draw


def test_tiles_keep_the_shape_of_their_image():
    tall = np.full((40, 20, 3), 7, np.uint8)
    piece = draw.tile(tall, 48, frame=(1, 2, 3))
    assert piece.shape == (48, 48, 3)
    assert tuple(piece[0, 0]) == tuple(piece[-1, -1]) == (1, 2, 3)
    assert tuple(piece[24, 24]) == (7, 7, 7) and tuple(piece[24, 4]) == (255, 255, 255)
    gray = draw.tile(tall[..., :1], 48)
    assert gray.shape == (48, 48, 3) and tuple(gray[24, 24]) == (7, 7, 7)


def test_labels_are_laid_over_a_image():
    pixels = np.full((2, 2, 3), 100, np.uint8)
    mixed = draw.tinted(pixels, np.array([[0, 1], [2, 0]]), draw.palette())
    np.testing.assert_array_equal(mixed, [[(100, 100, 100), (114, 50, 50)], [(50, 114, 50), (100, 100, 100)]])


def test_rows_of_different_lengths(tmp_path):
    piece = np.zeros((10, 10, 3), np.uint8)
    draw.save_rows(tmp_path / "new" / "a.png", [[piece], [piece, piece]])
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (2 * 14 + 12, 2 * 14 + 4)
        assert image.getpixel((30, 6)) == (255, 255, 255) and image.getpixel((30, 20)) == (0, 0, 0)
