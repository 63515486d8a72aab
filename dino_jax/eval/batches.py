"""Batches for protocols that train: shuffled and augmented training batches, and test batches, on a mesh.

Every draw depends only on (seed, epoch, position, row), so results do not depend on resuming, the number of devices or
the number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dino_jax.data.crops import draw_boxes, to_pil
from dino_jax.data.decode import BadImage, decode
from dino_jax.data.example import Example
from dino_jax.data.pipeline import make_eval_dataset
from dino_jax.data.sources import Source
from dino_jax.errors import UserError
from dino_jax.eval.features import MAX_BAD_SHARE, counted
from dino_jax.eval.images import grouped, parallel
from dino_jax.parallel.sharding import make_mesh, process_rows, to_devices

_log = logging.getLogger(__name__)

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Subset:
    """A subset of a source's rows, as a source."""

    def __init__(self, source: Source, rows: np.ndarray):
        self.source, self.rows, self.class_names = source, rows, source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.rows[index])]


def data_mesh() -> Mesh:
    """A mesh that shards only the batch, over all devices."""
    return make_mesh({"data": -1, "fsdp": 1, "model": 1})


def rounded(batch_size: int, mesh: Mesh) -> int:
    """The batch size rounded up to a multiple of the devices; extra rows are padding."""
    return -(-batch_size // mesh.size) * mesh.size


def train_batches(
    source: Source,
    augment: Augment,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    channels: int,
    threads: int,
    repeats: int = 1,
) -> Iterator[dict[str, jax.Array]]:
    """One shuffled epoch: `image` uint8 [B, h, w, C], `label` int32 [B], `valid` bool [B], sharded over the mesh.

    Unreadable images, and padding in the last batch, are not valid. With `repeats`, an epoch holds a share 1 / repeats
    of the images, each that many times and augmented independently (Hoffer et al. 2020).
    """
    size = rounded(batch_size, mesh)
    mine = process_rows(size, mesh)
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(source))
    order = list(enumerate(np.repeat(shuffled, repeats)[: len(source)].tolist()))
    bad: list[int] = []

    def load(item: tuple[int, int] | None) -> tuple[np.ndarray | None, int]:
        if item is None:
            return None, -1
        place, row = item
        try:
            image, label, _ = source[row]
            return augment(decode(image, channels), np.random.default_rng((seed, epoch, place, row))), label
        except BadImage as error:
            bad.append(row)
            _log.warning("image %d is skipped: %s", row, error)
            if len(bad) > max(1, MAX_BAD_SHARE * len(source)):
                raise UserError(f"{len(bad)} training images cannot be read, last image {row}: {error}") from None
            return None, -1

    def rows() -> Iterator[tuple[int, int] | None]:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            filled = batch + [None] * (size - len(batch))
            yield from (filled[row] for row in mine)

    for group in grouped(parallel(load, rows(), threads), len(mine)):
        shape = next((image.shape for image, _ in group if image is not None), None)
        if shape is None:
            continue
        blank = np.zeros(shape, np.uint8)
        batch = {
            "image": np.stack([blank if image is None else image for image, _ in group]),
            "label": np.array([label for _, label in group], np.int32),
            "valid": np.array([image is not None for image, _ in group]),
        }
        yield to_devices(batch, mesh, size)


def test_batches(source: Source, config: Any, mesh: Mesh, channels: int) -> Iterator[dict[str, jax.Array]]:
    """All images, resized and cropped as in `config`: `image`, `label`, `valid`, sharded over the mesh."""
    size = rounded(config.batch_size, mesh)
    batches = make_eval_dataset(
        source,
        resize=config.resize,
        crop=config.crop,
        batch_size=size,
        rows=process_rows(size, mesh),
        channels=channels,
        threads=config.threads,
    )
    for batch in counted(batches, "test images", len(source)):
        yield to_devices({key: batch[key] for key in ("image", "label", "valid")}, mesh, size)


def crop_and_flip(
    pixels: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    how: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """torchvision's RandomResizedCrop to a square, then RandomHorizontalFlip, on uint8 [H, W, C]."""
    box, flip = draw_crop(pixels.shape[0], pixels.shape[1], rng, scale)
    return cut(pixels, box, flip, size, how)


def draw_crop(height: int, width: int, rng: np.random.Generator, scale: tuple[float, float]) -> tuple[np.ndarray, bool]:
    """A random box (top, left, height, width) with an area share in `scale`, and whether to flip."""
    box = draw_boxes(rng.random((1, 10, 4)), height, width, np.array([scale]), (3 / 4, 4 / 3))[0]
    return box, bool(rng.random() < 0.5)


def cut(pixels: np.ndarray, box: np.ndarray, flip: bool, size: int, how: Image.Resampling) -> np.ndarray:
    """Crops a box from uint8 [H, W, C], resizes it to a square and optionally flips it."""
    top, left, height, width = (int(v) for v in box)
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    planes = [np.asarray(plane.resize((size, size), how)) for plane in to_pil(part)]
    image = planes[0] if pixels.shape[-1] == 3 else np.stack(planes, axis=-1)
    return image[:, ::-1] if flip else image
