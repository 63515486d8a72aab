"""Decoding: encoded bytes or arrays to uint8 pixels, or a `BadImage` with the reason.

PIL decodes, except RGB JPEGs at full size: for those `simplejpeg` gives the same pixels bit for bit (both are
libjpeg-turbo) in about 0.7 of the time (docs/benchmarks.md). The content decides the format, not the file's name.
Conversions, chosen so that the pixels are what a viewer shows:
- EXIF orientation is applied (torchvision's ImageFolder does not; few images of ImageNet are rotated).
- Transparent images are laid over white; CMYK, palette and gray become RGB; an animation gives its first frame.
- 16 bits a channel become 8 by dropping the lower byte; floating-point pixels must lie in 0..1.
- `.npy` files hold [H, W] or [H, W, C]. TIFFs that PIL cannot read (many channels) are read by `tifffile`, if there.

Memory is bounded before it is allocated: a file has at most `FILE_BYTES`, an image at most 100 megapixels (less in
formats whose decoders need more, see `PIXEL_BYTES`). Images that need much memory are decoded one at a time.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import simplejpeg
from etils import epath
from PIL import Image, UnidentifiedImageError

from dino_jax.data.storage import cause, read_file
from dino_jax.errors import printable

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # sizes are checked here
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")  # PIL's names; no others are opened
FILE_BYTES = 512 << 20  # of the file of one image
DECODE_BYTES = 700_000_000  # at the peak of decoding one image
PIXEL_BYTES = {"WEBP": 17, "AVIF": 16, "JPEG2000": 20}  # at that peak, per pixel; measured for RGB
OTHER_BYTES = 7  # 4 in PIL, 3 as an array
LARGE = 1 << 27  # bytes at the peak; above it images are decoded one at a time
MANY_BYTES = 1 << 26  # of pixels; above it they are resized channel by channel, for less memory
STRIP = 1 << 22  # pixels that are converted at a time
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
DEFLATE, LZMA, DEFLATE_RATIO = (8, 32946), 34925, 1032  # TIFF's numbers of compressions, and the most deflate reaches
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class BadImage(Exception):
    """An image that cannot be used. The message is a short reason; `name` is the image's, if known."""

    name: str = ""

    def __str__(self) -> str:
        return printable(super().__str__())


class _Turn(threading.local):
    """What a thread holds until it is done with an image."""

    held: contextlib.ExitStack | None = None


_one_large, _turn = threading.RLock(), _Turn()


@contextlib.contextmanager
def one_image() -> Iterator[None]:
    """For what a thread does with one image, from decoding on: no other thread holds a large image at the same time."""
    with contextlib.ExitStack() as held:
        _turn.held, before = held, _turn.held
        try:
            yield
        finally:
            _turn.held = before


@contextlib.contextmanager
def _alone(large: bool) -> Iterator[None]:
    """Holds the lock during the block if `large`; in `one_image` until that ends."""
    if large and _turn.held is not None:
        _turn.held.enter_context(_one_large)
    with _one_large if large else contextlib.nullcontext():
        yield


def read_bytes(path: epath.PathLike) -> bytes:
    """The whole file of an image, local or remote. Everything that reads an image by its path does it here.

    Raises:
      BadImage: it cannot be read, is not a regular file, or has more than `FILE_BYTES`.
    """
    try:
        return read_file(path, FILE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(f"cannot be read: {cause(error)}") from error


def decode(image: bytes | np.ndarray | Image.Image, channels: int = 3, limit: int | None = None) -> np.ndarray:
    """Encoded bytes, an array [H, W] or [H, W, C], or a PIL image (as its file), to uint8 [H, W, channels].

    With `limit`, an image whose longer side exceeds it is shrunk to it (bicubic, antialiased; a JPEG first by its
    decoder to the nearest half, quarter or eighth that is not smaller). Raises `BadImage` for whatever cannot be
    decoded or has another number of channels; gray and color convert into each other.
    """
    with one_image() if _turn.held is None else contextlib.nullcontext():
        pixels = _decoded(image, channels, limit)
        return shrink(pixels, limit) if limit and max(pixels.shape[:2]) > limit else pixels


def _decoded(image: bytes | np.ndarray | Image.Image, channels: int, limit: int | None) -> np.ndarray:
    """`decode` without the last resize."""
    try:
        if isinstance(image, Image.Image):
            pixels = _from_image(image, channels)
        else:
            pixels = (
                _from_array(image, channels) if isinstance(image, np.ndarray) else _from_bytes(image, channels, limit)
            )
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("more than 178", OTHER_BYTES) from error  # PIL's own limit
    except UnidentifiedImageError as error:
        raise BadImage("not an image in a known format") from error
    except MemoryError as error:
        raise BadImage("there is no memory to decode it: shrink it") from error
    except Exception as error:  # damaged files raise nearly anything inside PIL's plug-ins
        raise BadImage("damaged: " + (" ".join(str(error).split()) or type(error).__name__)) from error
    if 0 in pixels.shape:
        raise BadImage("has no pixels")
    return pixels


def shrink(pixels: np.ndarray, limit: int) -> np.ndarray:
    """Resizes uint8 [H, W, C] so that its longer side is `limit` pixels, the other at least 1."""
    height, width = pixels.shape[:2]
    scale = limit / max(height, width)
    return resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] to another height and width, bicubic and antialiased."""
    if pixels.shape[-1] == 3 and pixels.nbytes < MANY_BYTES:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], axis=-1)


def open_image(data: bytes) -> Image.Image:
    """Opens encoded bytes in one of `FORMATS`, without decoding: `check_size` comes before `load`."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def check_size(image: Image.Image) -> int:
    """The bytes that decoding an opened image takes at the peak. Raises `BadImage` if they are too many."""
    each = PIXEL_BYTES.get(image.format or "", OTHER_BYTES)
    if image.width * image.height * each > DECODE_BYTES:
        raise _too_large(f"{image.width * image.height / 1e6:.0f}", each, f" of a {image.format}")
    return image.width * image.height * each


def _too_large(megapixels: str, each: int, of: str = "") -> BadImage:
    most = DECODE_BYTES // each // 1_000_000
    return BadImage(f"{megapixels} megapixels, and at most {most}{of} are decoded: shrink it or cut it into tiles")


def _from_bytes(data: bytes, channels: int, limit: int | None) -> np.ndarray:
    if not data:
        raise BadImage("the file is empty")
    if data[:6] == b"\x93NUMPY":
        return _from_array(_read_npy(data), channels)
    try:
        image = open_image(data)
    except UnidentifiedImageError:
        if data[:4] in TIFF_MAGIC:
            return _from_array(_read_tiff(data), channels)
        raise
    fast = image.format == "JPEG" and image.mode == "RGB" and channels == 3
    if limit and image.format == "JPEG" and max(image.size) > limit:
        scale, fast = limit / max(image.size), False
        image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return _from_image(image, channels, data if fast else None)


def _from_image(image: Image.Image, channels: int, jpeg: bytes | None = None) -> np.ndarray:
    """An opened image to uint8 [H, W, channels], upright; `jpeg`: its bytes, if the faster decoder may be tried."""
    with _alone(check_size(image) > LARGE):
        if jpeg is not None and _upright(image) is None:
            with contextlib.suppress(ValueError):  # damaged: PIL may still read it, or says why not
                return simplejpeg.decode_jpeg(jpeg)
        image.load()
        upright = _upright(image)  # a PNG may hold EXIF behind its pixels
        pixels = _from_pil(image, channels)
        del image
        return pixels if upright is None else np.ascontiguousarray(upright(pixels))


def _upright(image: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    """What turns the pixels upright, by the EXIF orientation; None if nothing does or EXIF cannot be read."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data can be damaged in any way
        return None


def _from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """A loaded image to uint8 [H, W, channels], in strips, so that conversions need little memory."""
    if image.width * image.height <= STRIP:
        return _convert(image, channels)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for rows in strips(image.height, image.width):
        pixels[rows] = _convert(image.crop((0, rows.start, image.width, rows.stop)), channels)
    return pixels


def strips(height: int, width: int) -> Iterator[slice]:
    """The rows of an image in pieces of about `STRIP` pixels, to work on one after another."""
    rows = max(1, STRIP // max(width, 1))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _convert(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; mode I is how PIL holds 16-bit PGM and PNG
        return _from_array(np.asarray(image).clip(0, 65535).astype(np.uint16), channels)
    if image.mode == "F" or channels not in (1, 3):
        return _from_array(np.asarray(image), channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    mode = "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _from_array(array: np.ndarray, channels: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise BadImage(f"an array of shape {array.shape} is not [height, width, channels]")
    height, width, found = array.shape
    if found != channels and {found, channels} != {1, 3}:
        raise BadImage(f"has {found} channels where {channels} are expected")
    if height * width * OTHER_BYTES > DECODE_BYTES:
        raise _too_large(f"{height * width / 1e6:.0f}", OTHER_BYTES)
    if array.dtype == np.uint8 and found == channels:
        return array
    pixels = np.empty((height, width, channels), np.uint8)
    for rows in strips(height, width * found):
        part = _to_uint8(array[rows])
        if (found, channels) == (3, 1):
            part = np.asarray(Image.fromarray(np.ascontiguousarray(part)).convert("L"))[..., None]
        pixels[rows] = part
    return pixels


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # also refuses NaN
            raise BadImage("floating-point pixels outside 0..1")
        return np.rint(array * 255).astype(np.uint8)
    raise BadImage(f"pixels of type {array.dtype} are not supported")


def npy_header(file: IO[bytes], kinds: str = "biuf") -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of .npy data: shape, whether in Fortran's order, dtype (of one of `kinds`).

    Raises:
      ValueError: it is damaged, or the dtype is not one of numbers (objects are never read).
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format holds no plain numbers")
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in kinds:
        raise ValueError(f"an array of {dtype}, not of numbers")
    if any(side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, fortran, dtype


def _read_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    shape, fortran, dtype = npy_header(file)
    begin, needed = file.tell(), math.prod(shape) * dtype.itemsize
    if needed > len(data) - begin:
        raise BadImage(f"truncated: {len(data) - begin} bytes where its shape {shape} needs {needed}")
    return np.ndarray(shape, dtype, data, begin, order="F" if fortran else "C")


def _read_tiff(data: bytes) -> np.ndarray:
    """The first page of a TIFF as [H, W] or [H, W, C]."""
    try:
        import tifffile
    except ImportError as error:
        raise BadImage("a TIFF that PIL cannot read; install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        if page.dtype is None or math.prod(page.shape) * (page.dtype.itemsize + 1) > DECODE_BYTES:
            raise BadImage(f"a page of {page.shape} {page.dtype} is too large to decode: cut it into tiles")
        if page.compression == LZMA:
            raise BadImage("a TIFF compressed by LZMA: save it with another compression")
        if page.compression in DEFLATE:
            for begin, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                _check_deflate(data[begin : begin + count], page.nbytes)
        array = page.asarray()
    return np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array


def _check_deflate(data: bytes, most: int) -> None:
    """Raises `BadImage` if a compressed part of an image holds more bytes than the whole image."""
    if len(data) * DEFLATE_RATIO <= DECODE_BYTES:
        return
    stream, total = zlib.decompressobj(), 0
    while data:
        total += len(stream.decompress(data, STRIP))
        data = stream.unconsumed_tail
        if total > most + STRIP:
            raise BadImage("damaged: it holds more data than pixels")
