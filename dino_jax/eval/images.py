"""Reads, resizes and batches images that do not come from a data source."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath
from PIL import Image

from dino_jax.data.crops import to_pil
from dino_jax.data.decode import BadImage, check_size, decode, open_image, read_bytes
from dino_jax.data.storage import cause, read_text
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
    """Reads a label map uint8 [H, W]: the raw values of an indexed, gray or binary image, without its palette.

    A color image is read if it is gray (its three channels are equal) or has the colors of `draw.palette` (VOC's and
    DAVIS's), which become their numbers.

    Raises:
      UserError: the file is missing, damaged, a JPEG (which changes values), transparent, or has other colors or values
        above 255.
    """
    try:
        with open_image(read_bytes(path)) as image:
            check_size(image)
            if image.format == "JPEG":
                raise UserError(f"{path}: a mask as JPEG has lost its values: save it as PNG")
            return _labels(image, path)
    except UserError:
        raise
    except Exception as error:  # PIL's plug-ins raise anything for damaged files
        raise UserError(f"{path}: {_reason(error)}") from None


def _labels(image: Image.Image, path: epath.PathLike) -> np.ndarray:
    values = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        if (values[..., -1] != 255).any():
            raise UserError(f"{path}: a mask must not be transparent: save it as an indexed or gray PNG")
        values = values[..., :-1]
    values = values[..., 0] if image.mode == "LA" else values
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3 and image.mode in ("RGB", "RGBA"):
        known, colors = (x.astype(np.int32) @ np.array([65536, 256, 1], np.int32) for x in (palette(), values))
        order = np.argsort(known)
        numbers = order[np.searchsorted(known[order], colors).clip(0, 255)]
        if (wrong := known[numbers] != colors).any():
            color = values[wrong][0].tolist()
            raise UserError(f"{path}: a mask must be indexed or gray; its color {color} is not in VOC's palette")
        return numbers.astype(np.uint8)
    if values.ndim != 2 or values.dtype.kind not in "bui" or values.min() < 0 or values.max() > 255:
        raise UserError(f"{path}: a mask must be indexed or gray with values up to 255, not {image.mode}")
    return values.astype(np.uint8)


def palette() -> np.ndarray:
    """The label colors of VOC and DAVIS, uint8 [256, 3]: the label's bits spread over red, green, blue."""
    numbers = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def _reason(error: Exception) -> str:
    return "no such file" if isinstance(error.__cause__, FileNotFoundError) else f"cannot be read ({cause(error)})"


def list_images(folder: epath.PathLike) -> list[epath.Path]:
    """The images directly in a folder, by name, numbers in it by value (2 before 10).

    Raises:
      UserError: there are none, or the folder cannot be read.
    """
    folder = epath.Path(folder)
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {cause(error)}") from error
    if not found:
        raise UserError(f"{folder}: {'no images in it' if folder.is_dir() else 'no such folder'}")
    return sorted(found, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key for sorting by the numbers in names."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def listed(listing: epath.Path, fix: str) -> list[str]:
    """The image names in a list file, one per line: relative paths.

    Raises:
      UserError: the file cannot be read, is empty (with `fix`), or has a name twice or one outside its folder.
    """
    names = [line.strip() for line in read_text(listing).splitlines() if line.strip()] if listing.exists() else []
    if not names:
        raise UserError(f"{listing}: {'the list is empty' if listing.exists() else 'no such file'}: {fix}")
    for name, times in collections.Counter(names).items():
        if times > 1:
            raise UserError(f"{listing}: {name} is listed {times} times")
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{listing}: {name}: not a name in the data set's folders")
    return names


def check_all(load: Callable[[int], T], count: int, threads: int = 4) -> list[T]:
    """`load(i)` for all i, so that what cannot be used is known before the work.

    Raises:
      UserError: the number of items that cannot be loaded, and the reason of the first.
    """
    failed: list[str] = []

    def attempt(index: int) -> T | None:
        try:
            return load(index)
        except UserError as error:
            failed.append(str(error))
            return None

    found = list(parallel(attempt, range(count), threads))
    if failed:
        more = f" ({len(failed)} of {count} cannot be used)" if len(failed) > 1 else ""
        raise UserError(f"{min(failed, key=lambda text: _natural(text))}{more}")
    return [item for item in found if item is not None]


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
