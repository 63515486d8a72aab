"""Reads, resizes and batches images that do not come from a data source."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath
from PIL import Image

from dino_jax.data.crops import to_pil
from dino_jax.data.decode import BadImage, check_size, decode, open_image, read_bytes
from dino_jax.errors import UserError
from dino_jax.models.resample import LINEAR, resample_matrix

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_image(path: epath.PathLike, channels: int = 3) -> np.ndarray:
    """Reads an image as uint8 [H, W, channels]. Raises `UserError` if the file is missing or damaged."""
    try:
        return decode(read_bytes(path), channels)
    except BadImage as error:
        raise UserError(f"{path}: {_reason(error)}") from None


def read_labels(path: epath.PathLike) -> np.ndarray:
    """Reads a label map uint8 [H, W] from an indexed, gray or binary image: raw values, no palette applied.

    Raises:
      UserError: the file is missing, damaged or a color image.
    """
    try:
        with open_image(read_bytes(path)) as image:
            check_size(image)
            if image.mode not in ("P", "L", "1"):
                raise UserError(f"{path}: a mask must be indexed or gray, not {image.mode}")
            return np.asarray(image).astype(np.uint8)
    except UserError:
        raise
    except Exception as error:  # PIL's plug-ins raise anything for damaged files
        raise UserError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return "no such file" if isinstance(error.__cause__, FileNotFoundError) else f"cannot be read ({error})"


def list_images(folder: epath.PathLike) -> list[epath.Path]:
    """The images directly in a folder, by name. Raises `UserError` if there are none."""
    folder = epath.Path(folder)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder}: {'no images in it' if folder.is_dir() else 'no such folder'}")
    return found


def listed(listing: epath.Path, fix: str) -> list[str]:
    """The image names in a list file, one per line. Raises `UserError` with `fix` if there are none."""
    names = listing.read_text().split() if listing.exists() else []
    if not names:
        raise UserError(f"{listing}: {'the list is empty' if listing.exists() else 'no such file'}: {fix}")
    return names


def resize(pixels: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """PIL's antialiased resize for uint8 [H, W, C]."""
    planes = [np.asarray(plane.resize((width, height), how)) for plane in to_pil(pixels)]
    return planes[0] if pixels.shape[-1] == 3 else np.stack(planes, axis=-1)


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's nearest-neighbor resize for a label map uint8 [H, W]."""
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def linear_matrix(old: int, new: int, step: float | None = None) -> np.ndarray:
    """The matrix [new, old] of a linear resize without antialiasing, as in torch's `interpolate` and OpenCV.

    Half-pixel centers, edges repeated. `step`: old pixels per new pixel; default old / new.
    """
    places = (np.arange(new) + 0.5) * (old / new if step is None else step) - 0.5
    return resample_matrix(np.clip(places, 0, old - 1), old, LINEAR)


def linear_resize(pixels: np.ndarray, height: int, width: int, step: float | None = None) -> np.ndarray:
    """Resizes [H, W, C] by `linear_matrix` in both directions, to float32 [height, width, C]."""
    rows = linear_matrix(pixels.shape[0], height, step).astype(np.float32)
    columns = linear_matrix(pixels.shape[1], width, step).astype(np.float32)
    return np.einsum("hy,yxc,wx->hwc", rows, pixels.astype(np.float32), columns, optimize=True)


def parallel(load: Callable[[Any], T], items: Iterable[Any], threads: int = 4) -> Iterator[T]:
    """`map(load, items)` in order, on threads that prefetch a few results."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def batches_by_size(images: Iterable[np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches images [h, w, C] by size: `image` [B, h, w, C] and `index` int [B], positions in the input."""
    groups: dict[tuple, list[tuple[int, np.ndarray]]] = {}
    for index, image in enumerate(images):
        group = groups.setdefault(image.shape, [])
        group.append((index, image))
        if len(group) == batch_size:
            yield _stack(groups.pop(image.shape))
    yield from map(_stack, groups.values())


def _stack(group: list[tuple[int, np.ndarray]]) -> dict[str, np.ndarray]:
    return {"image": np.stack([p for _, p in group]), "index": np.array([i for i, _ in group])}
