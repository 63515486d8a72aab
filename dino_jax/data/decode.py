"""Decoding: encoded bytes or arrays to uint8 pixels, or a `BadImage` with the reason.

PIL decodes, except RGB JPEGs at full size: for those `simplejpeg` gives the same pixels bit for bit (both are
libjpeg-turbo) in about 0.7 of the time (docs/benchmarks.md). The content decides the format, not the file's name.
Conversions, chosen so that the pixels are what a viewer shows:
- EXIF orientation is applied (torchvision's ImageFolder does not; few images of ImageNet are rotated).
- Transparent images are laid over white; CMYK, palette and gray become RGB; an animation gives its first frame.
- 16 bits a channel become 8 by dropping the lower byte; floating-point pixels must lie in 0..1.
- `.npy` files hold [H, W] or [H, W, C]. TIFFs that PIL cannot read (many channels) are read by `tifffile`, if there.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class BadImage(Exception):
    """An image that cannot be used; the message is the reason in a few words, `name` the image's, where known."""

    name: str = ""


def decode(image: bytes | np.ndarray, channels: int = 3, limit: int | None = None) -> np.ndarray:
    """Encoded bytes, or an array [H, W] or [H, W, C], to uint8 [H, W, channels].

    With `limit`, an image whose longer side exceeds it is shrunk to it (bicubic, antialiased; a JPEG first by its
    decoder to the nearest half, quarter or eighth that is not smaller). Raises `BadImage` for whatever cannot be
    decoded or has another number of channels; gray and color convert into each other.
    """
    try:
        pixels = _from_array(image, channels) if isinstance(image, np.ndarray) else _from_bytes(image, channels, limit)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("decompression bomb: more pixels than PIL's limit") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image in a known format") from error
    except Exception as error:  # damaged files raise nearly anything inside PIL's plug-ins
        raise BadImage("damaged: " + (" ".join(str(error).split()) or type(error).__name__)) from error
    if 0 in pixels.shape:
        raise BadImage("has no pixels")
    return shrink(pixels, limit) if limit and max(pixels.shape[:2]) > limit else pixels


def shrink(pixels: np.ndarray, limit: int) -> np.ndarray:
    """Resizes uint8 [H, W, C] so that its longer side is `limit` pixels, the other at least 1."""
    height, width = pixels.shape[:2]
    scale = limit / max(height, width)
    return resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] to another height and width, bicubic and antialiased."""
    if pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], axis=-1)


def _from_bytes(data: bytes, channels: int, limit: int | None) -> np.ndarray:
    if not data:
        raise BadImage("the file is empty")
    if data[:6] == b"\x93NUMPY":
        return _from_array(np.load(io.BytesIO(data), allow_pickle=False), channels)
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[:4] in TIFF_MAGIC:
            return _from_array(_read_tiff(data), channels)
        raise
    if limit and image.format == "JPEG" and max(image.size) > limit:
        scale = limit / max(image.size)
        image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    elif image.format == "JPEG" and image.mode == "RGB" and channels == 3 and _turn(image) is None:
        try:
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # damaged: PIL may still read it, or says why not
    image.load()
    turn = _turn(image)
    return _from_pil(image if turn is None else image.transpose(turn), channels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright, by its EXIF orientation; None where nothing does or EXIF cannot be read."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data can be damaged in any way
        return None


def _from_pil(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; mode I is how PIL holds 16-bit PGM and PNG
        return _from_array(np.asarray(image).clip(0, 65535).astype(np.uint16), channels)
    if image.mode == "F":
        return _from_array(np.asarray(image), channels)
    if channels not in (1, 3):
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
    array = _to_uint8(array)
    if array.shape[-1] == channels:
        return array
    if array.shape[-1] == 1 and channels == 3:
        return np.repeat(array, 3, axis=-1)
    if array.shape[-1] == 3 and channels == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[..., None]
    raise BadImage(f"has {array.shape[-1]} channels where {channels} are expected")


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


def _read_tiff(data: bytes) -> np.ndarray:
    """The first page of a TIFF as [H, W] or [H, W, C]."""
    try:
        import tifffile
    except ImportError as error:
        raise BadImage("a TIFF that PIL cannot read; install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        array = page.asarray()
    return np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array
