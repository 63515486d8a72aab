"""Image operations of the crop renderer in JAX, each on one image; `renderer` maps them over crops and images.

An image is a list of planes, float32 [H, W] with values in 0..255. They stay apart to the end: stacked next to the
color operations, XLA:CPU computes the whole chain again for each plane (200 times slower), and an axis of length 3 is
laid out badly on a TPU. Values are clamped to 0..255 after each operation, as PIL's 8 bits do, but never rounded.

Mean absolute difference from the same operation of Pillow 13, in levels of 255, over the random images (smooth,
textured, white noise) and parameters of `tests/render/test_renderer.py`. PIL's rounding to 8 bits alone makes 0.25 to
0.3:

    resample    0.30, at most 0.56 (white noise)      gray      0.25
    brightness  0.23                                  blur      0.42, at most 0.91; 1.04 for white noise, radius 0.1
    contrast    0.24                                  solarize  0
    saturation  0.24                                  flip      0
    hue         0.17                                  a whole crop  0.53, at most 1.3
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

Plane = Float[Array, "H W"]
RGB = list[Plane]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbering of CropParams.order and CropParams.factors
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's "L"


def clamp(plane: Float[Array, "*C H W"]) -> Float[Array, "*C H W"]:
    """Values into 0..255."""
    return jnp.clip(plane, 0.0, 255.0)


def cubic(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Keys' cubic kernel with a = -0.5, PIL's BICUBIC; zero outside [-2, 2]."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def resize_matrix(start: Int[Array, ""], length: Int[Array, ""], size: int, canvas: int) -> Float[Array, "size canvas"]:
    """The linear map from a line of `canvas` pixels to its interval [start, start + length) resized to `size` pixels.

    PIL's antialiased bicubic: the kernel is widened by the scale when shrinking, and each row sums to 1. torchvision
    crops before it resizes, so weights outside the interval are exactly zero.
    """
    scale = length.astype(jnp.float32) / size
    center = (jnp.arange(size) + 0.5) * scale  # [size], from the start of the interval
    pixel = jnp.arange(canvas) - start  # [canvas]
    weights = cubic((pixel + 0.5 - center[:, None]) / jnp.maximum(scale, 1.0))  # [size, canvas]
    weights = jnp.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resample(
    canvas: Float[Array, "C S T"], box: Int[Array, "4"], flip: Bool[Array, ""], size: tuple[int, int]
) -> Float[Array, "C h w"]:
    """The part `box` = (top, left, height, width) of the canvas, resized to `size` = (h, w); mirrored if `flip`.

    Two matrix products, columns first, clamped in between as in PIL (from Pillow 13 on, PIL takes rows first where they
    shrink more). Operands have the canvas's type, sums and result are float32; precision is the platform's default. In
    bfloat16 the canvas is exact (integers below 256), while weights and the rows in between are rounded, the latter no
    worse than PIL's 8 bits: 0.17 levels of 255 on average beside PIL's own 0.29, 0.34 together. TF32: 0.02 beside it.
    """
    columns = resize_matrix(box[1], box[3], size[1], canvas.shape[2])
    columns = jnp.where(flip, columns[::-1], columns).astype(canvas.dtype)  # [w, T]
    rows = resize_matrix(box[0], box[2], size[0], canvas.shape[1]).astype(canvas.dtype)  # [h, S]
    product = functools.partial(jnp.einsum, precision=lax.Precision.DEFAULT)
    wide = clamp(product("cst,wt->csw", canvas, columns))  # [C, S, w]
    return clamp(product("csw,hs->chw", wide, rows, preferred_element_type=jnp.float32))  # [C, h, w]


def luma(planes: RGB) -> Plane:
    """PIL's L of red, green and blue planes."""
    return LUMA[0] * planes[0] + LUMA[1] * planes[1] + LUMA[2] * planes[2]


def gray(planes: RGB) -> RGB:
    """The image without color."""
    return [luma(planes)] * 3


def shift_hue(planes: RGB, turns: Float[Array, ""]) -> RGB:
    """Turns the hue as torchvision does through PIL's 8-bit HSV, whose bytes are cut off, not rounded.

    A full turn is 255 levels of hue on conversion but 256 on wrapping, and the shift is cut towards zero: kept, since
    every published run had them.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    colored = chroma > 0.0
    share = 1.0 / jnp.where(colored, chroma, 1.0)
    sector = jnp.where(green == value, 2.0 + (blue - red) * share, 4.0 + (red - green) * share)
    sector = jnp.where(red == value, (green - blue) * share, sector)  # -1..5
    sector = jnp.where(sector < 0.0, sector + 6.0, sector)
    level = jnp.floor(sector * (255.0 / 6.0)) + jnp.trunc(turns * 255.0) % 256.0
    hue = jnp.where(level >= 256.0, level - 256.0, level) * (6.0 / 255.0)  # 0..6
    drop = value * jnp.floor(chroma * 255.0 / jnp.where(colored, value, 1.0)) / 255.0  # largest minus smallest channel
    ramps = jnp.abs(hue - 3.0) - 1.0, 2.0 - jnp.abs(hue - 2.0), 2.0 - jnp.abs(hue - 4.0)
    return [value - drop * (1.0 - jnp.clip(ramp, 0.0, 1.0)) for ramp in ramps]


def blend(planes: RGB, operation: Int[Array, ""], factor: Float[Array, ""], mean: Float[Array, ""]) -> RGB:
    """Brightness, contrast or saturation: a blend with black, the mean gray or the gray image; factor 1: unchanged.

    PIL's blend drops the fraction; half a level is taken off here, which is the same on average.
    """
    color = jnp.where(operation == SATURATION, 1.0 - factor, 0.0)
    level = jnp.where(operation == CONTRAST, (1.0 - factor) * mean, 0.0) - jnp.where(factor == 1.0, 0.0, 0.5)
    shade = color * luma(planes) + level
    return [clamp(factor * plane + shade) for plane in planes]


def jitter(planes: RGB, order: Int[Array, "4"], factors: Float[Array, "4"]) -> RGB:
    """Brightness, contrast, saturation and hue in the given order; `factors` are numbered as the operations are.

    Only the contrast looks beyond its pixel, at the mean luma. So one pass finds that mean and a second one does
    the work, each a chain of pixelwise operations that compiles into one loop over memory.
    """
    _, seen = _jitter_pass(planes, order, factors, jnp.zeros(()))
    mean = jnp.floor(seen.mean() + 0.5)  # PIL rounds it
    return _jitter_pass(planes, order, factors, mean)[0]


def _jitter_pass(
    planes: RGB, order: Int[Array, "4"], factors: Float[Array, "4"], mean: Float[Array, ""]
) -> tuple[RGB, Plane]:
    """The jittered planes given the mean that the contrast needs, and the luma that the contrast sees.

    The hue, by far the most expensive, is computed once: the others have slots before and after it.
    """
    turn = jnp.argmax(order == HUE)
    places = jnp.arange(4)
    seen = jnp.zeros_like(planes[0])
    planes, seen = _blends(planes, seen, order[:3], places[:3] < turn, factors, mean)
    turned = shift_hue(planes, factors[HUE])
    planes = [jnp.where(factors[HUE] == 0.0, old, new) for old, new in zip(planes, turned, strict=True)]
    return _blends(planes, seen, order[1:], places[1:] > turn, factors, mean)


def _blends(
    planes: RGB,
    seen: Plane,
    operations: Int[Array, "3"],
    active: Bool[Array, "3"],
    factors: Float[Array, "4"],
    mean: Float[Array, ""],
) -> tuple[RGB, Plane]:
    """The active ones of three operations that are not the hue; `seen` becomes the luma before the contrast."""
    for slot in range(3):
        operation = operations[slot]
        seen = jnp.where(active[slot] & (operation == CONTRAST), luma(planes), seen)
        planes = blend(planes, operation, jnp.where(active[slot], factors[operation], 1.0), mean)
    return planes, seen


def box_radius(radius: Float[Array, ""]) -> Float[Array, ""]:
    """Half-width of the box whose threefold application has the variance radius ** 2 (PIL's GaussianBlur).

    An extended box (Gwosdek et al. 2011): 2 l + 1 whole pixels and two fractional ones.
    """
    variance = radius * radius / 3.0
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - (whole + 1.0) ** 2))
    return whole + part


def blur_matrix(radius: Float[Array, ""], size: int) -> Float[Array, "size size"]:
    """PIL's Gaussian blur of one line as a matrix: three extended boxes, each with the edge pixels repeated."""
    half = box_radius(radius)
    place = jnp.arange(size)
    inside = place[:, None] - place  # [size, size], output - input
    box = jnp.clip(half + 1.0 - jnp.abs(inside), 0.0, 1.0)
    before = jnp.maximum(half - place, 0.0)  # [size], the share of each box that lies before the first pixel
    box = box.at[:, 0].add(before).at[:, -1].add(before[::-1])
    thrice = jnp.matmul(jnp.matmul(box, box, precision=lax.Precision.HIGH), box, precision=lax.Precision.HIGH)
    return thrice / thrice.sum(axis=1, keepdims=True)


def blur(planes: RGB, radius: Float[Array, ""]) -> RGB:
    """PIL's GaussianBlur; radius 0 changes nothing."""
    height, width = planes[0].shape
    columns = blur_matrix(radius, width)
    rows = columns if height == width else blur_matrix(radius, height)
    wide = [jnp.matmul(plane, columns.T, precision=lax.Precision.HIGH) for plane in planes]
    return [jnp.matmul(rows, plane, precision=lax.Precision.HIGH) for plane in wide]


def solarize(plane: Float[Array, "*C H W"], threshold: int) -> Float[Array, "*C H W"]:
    """Inverts the values that PIL's 8 bits would round to `threshold` or more."""
    return jnp.where(plane >= threshold - 0.5, 255.0 - plane, plane)


def normalize(
    images: Num[Array, "*B H W c"], mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype
) -> Float[Array, "*B H W c"]:
    """Values 0..255 with channels last to zero mean and unit variance; float32 inside, `dtype` out."""
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)
