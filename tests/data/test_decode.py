"""Decoding: every kind of image found in practice is converted as a viewer shows it, or reported as bad."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import BadImage, decode, shrink


def encode(pil_image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    pil_image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A hand-written PNG, for kinds that PIL does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A smooth image without symmetry, uint8 [20, 30, 3]."""
    y, x = np.mgrid[:20, :30]
    return np.stack([y * 12, x * 8, 255 - (x + y) * 5], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def pil_image(pixels) -> Image.Image:
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_formats_are_recognised_by_content(pil_image, pixels, form):
    lossless = form not in ("GIF", "JPEG")
    found = decode(encode(pil_image, form, **({"lossless": True} if form == "WEBP" else {})))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - pixels).mean() < (1e-9 if lossless else 8)


def test_jpegs_are_decoded_to_the_bit_as_pil_does(pil_image):
    data = encode(pil_image, "JPEG", quality=80)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_both_jpeg_decoders_agree_to_the_bit(subsampling):
    rng = np.random.default_rng(0)
    pil_image = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((131, 77))
    kinds = [{"quality": quality, "progressive": progressive} for quality in (50, 90) for progressive in (0, 1)]
    for kind in kinds:
        data = encode(pil_image, "JPEG", subsampling=subsampling, **kind)
        np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_gray_palette_cmyk_and_two_levels_become_rgb(pil_image, pixels):
    gray = np.asarray(pil_image.convert("L"))
    np.testing.assert_array_equal(decode(encode(pil_image.convert("L"), "PNG")), np.repeat(gray[..., None], 3, -1))
    cmyk = Image.fromarray(np.dstack([255 - pixels, np.zeros_like(gray)]), "CMYK")
    assert np.abs(decode(encode(cmyk, "JPEG", quality=95)).astype(int) - pixels).mean() < 4
    palette = pil_image.quantize(16)
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), palette.convert("RGB"))
    two = pil_image.convert("1")
    np.testing.assert_array_equal(decode(encode(two, "PNG"))[..., 1], np.asarray(two) * 255)


def test_transparent_images_lie_on_white(pil_image, pixels):
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, 10:], alpha[:, 20:] = 128, 255
    found = decode(encode(Image.fromarray(np.dstack([pixels, alpha])), "PNG"))
    assert (found[:, :10] == 255).all()
    np.testing.assert_allclose(found[:, 10:20], (pixels[:, 10:20] * 128.0 + 255 * 127) / 255, atol=1.01)
    np.testing.assert_array_equal(found[:, 20:], pixels[:, 20:])
    clear = pil_image.quantize(16)
    clear.info["transparency"] = int(np.asarray(clear)[0, 0])
    assert (decode(encode(clear, "PNG"))[0, 0] == 255).all()
    gray = np.dstack([np.full((20, 30), 100, np.uint8), alpha])
    assert (decode(encode(Image.fromarray(gray, "LA"), "PNG"))[0, 0] == 255).all()


def test_sixteen_bits_lose_their_lower_byte():
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(levels), "PNG")), expected)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(levels), "TIFF")), expected)
    pgm = b"P5 16 16 65535\n" + levels.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm), expected)
    color = np.stack([levels, levels[::-1], levels.T], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)
    np.testing.assert_array_equal(decode(png(16, 16, 16, 2, rows)), color >> 8)


def test_the_first_frame_of_an_animation_is_taken(pil_image):
    frames = [pil_image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)] * 2
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        found = decode(encode(pil_image, form, save_all=True, append_images=frames))
        assert np.abs(found.astype(int) - np.asarray(pil_image)).mean() < 12, form


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(pil_image, pixels, orientation):
    """By the EXIF table: the sides of the scene that stored row 0 and column 0 show."""
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],  # row 0 top, column 0 right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.swapaxes(0, 1),  # left, top
        6: lambda a: a[::-1].swapaxes(0, 1),  # right, top
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: lambda a: a[:, ::-1].swapaxes(0, 1),  # left, bottom
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(pil_image, "PNG", exif=exif)), upright[orientation](pixels))


def test_unreadable_exif_is_ignored(pil_image):
    data = encode(pil_image, "JPEG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff garbage")
    assert decode(data).shape == (20, 30, 3)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3000, 1), (1, 3000)])
def test_tiny_and_endless_images_decode(width, height):
    data = encode(Image.new("RGB", (width, height), (9, 8, 7)), "PNG")
    assert (decode(data) == (9, 8, 7)).all()
    assert decode(data).shape == (height, width, 3)


def test_damaged_files_are_bad_with_a_one_line_reason(pil_image):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, image = encode(noisy, "JPEG"), encode(noisy, "PNG")
    bomb = png(60_000, 60_000, 8, 2, b"\0")
    cases = {
        b"": "empty",
        b"<html>not found</html>": "known format",
        jpeg[: len(jpeg) // 2]: "truncated",
        jpeg[:100]: "damaged|known format",
        image[: len(image) // 2]: "damaged",
        image[:60] + b"\0" * 100 + image[160:]: "damaged|known format",
        encode(noisy, "GIF")[: 1 << 11]: "damaged",
        encode(noisy, "TIFF")[:50]: "damaged|PIL cannot read",
        encode(noisy, "WEBP")[:60]: "damaged|known format",
        bomb: "megapixels, and at most 100 are decoded: shrink it",
        b"\x93NUMPY\x01\x00rubbish": "damaged",
    }
    for data, reason in cases.items():
        with pytest.raises(BadImage, match=reason) as caught:
            decode(data)
        assert "\n" not in str(caught.value)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_arrays_pass_in_memory_and_as_npy(pixels):
    assert decode(pixels) is pixels
    np.testing.assert_array_equal(decode(npy(pixels)), pixels)
    np.testing.assert_array_equal(decode(pixels.astype(np.uint16) << 8), pixels)
    np.testing.assert_array_equal(decode(pixels.astype(np.float32) / 255), pixels)
    np.testing.assert_array_equal(decode(pixels > 100), (pixels > 100) * 255)
    gray = pixels[..., 0]
    np.testing.assert_array_equal(decode(gray), np.repeat(gray[..., None], 3, -1))
    np.testing.assert_array_equal(decode(gray, 1), gray[..., None])
    np.testing.assert_array_equal(decode(pixels, 1)[..., 0], Image.fromarray(pixels).convert("L"))


def test_many_channels(pixels, pil_image):
    many = np.concatenate([pixels, pixels], -1)
    np.testing.assert_array_equal(decode(npy(many), 6), many)
    four = np.dstack([pixels, pixels[..., 0]])
    np.testing.assert_array_equal(decode(encode(Image.fromarray(four), "PNG"), 4), four)
    with pytest.raises(BadImage, match="6 channels where 3"):
        decode(many)
    with pytest.raises(BadImage, match="3 channels where 5"):
        decode(encode(pil_image, "PNG"), 5)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.full((4, 4, 3), 7.0), "outside 0..1"),
        (np.full((4, 4, 3), np.nan), "outside 0..1"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.array([[["a"] * 3]]), "type"),
    ],
)
def test_arrays_that_are_not_images_are_bad(array, reason):
    with pytest.raises(BadImage, match=reason):
        decode(array)


@pytest.mark.extra
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiffs_of_many_channels(planar):
    tifffile = pytest.importorskip("tifffile")
    many = np.random.default_rng(0).integers(0, 65536, (12, 10, 7), dtype=np.uint16)
    buffer = io.BytesIO()
    stored = many if planar == "contig" else np.moveaxis(many, -1, 0)
    tifffile.imwrite(buffer, stored, photometric="minisblack", planarconfig=planar)
    np.testing.assert_array_equal(decode(buffer.getvalue(), 7), many >> 8)


def test_a_limit_shrinks_only_what_exceeds_it(pixels):
    large = np.asarray(Image.fromarray(pixels).resize((1200, 800), Image.Resampling.BICUBIC))
    for form in ("PNG", "JPEG"):
        data = encode(Image.fromarray(large), form)
        found = decode(data, limit=300)
        assert found.shape == (200, 300, 3)
        assert np.abs(found.astype(int) - shrink(large, 300)).mean() < 2
        np.testing.assert_array_equal(decode(data, limit=1200), decode(data))
    assert decode(np.zeros((1, 3000, 5), np.uint8), 5, limit=512).shape == (1, 512, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(Image.fromarray(large), "JPEG", exif=exif), limit=300).shape == (300, 200, 3)
