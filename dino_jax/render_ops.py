"""Image operations of the crop renderer in JAX, each on one image; `render.py` maps them over crops and images.

An image is planar, float32 [C, H, W] with values in 0..255: every product and stencil then has a spatial axis last.
Values are clamped to 0..255 after each operation, as PIL's 8 bits do, but never rounded.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Image = Float[Array, "C H W"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbering of CropParams.order and CropParams.factors
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's "L"


def clamp(image: Image) -> Image:
    """Values into 0..255."""
    return jnp.clip(image, 0.0, 255.0)


def cubic(x: Array) -> Array:
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
    centre = (jnp.arange(size) + 0.5) * scale  # [size], from the start of the interval
    pixel = jnp.arange(canvas) - start  # [canvas]
    weights = cubic((pixel + 0.5 - centre[:, None]) / jnp.maximum(scale, 1.0))  # [size, canvas]
    weights = jnp.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resample(
    canvas: Float[Array, "C S T"], box: Int[Array, "4"], flip: Bool[Array, ""], size: tuple[int, int]
) -> Float[Array, "C h w"]:
    """The part `box` = (top, left, height, width) of the canvas, resized to `size` = (h, w); mirrored if `flip`.

    Two matrix products, columns first as in PIL, which also clamps in between. They run at the platform's default
    precision: canvas values are integers below 256, exact in bfloat16, so one bf16 pass (TPU) rounds only the weights
    and the clamped rows: 0.17 levels of 255 on average beside PIL's own 8-bit rounding of 0.29 (together 0.34);
    TF32 (NVIDIA) 0.02.
    """
    columns = resize_matrix(box[1], box[3], size[1], canvas.shape[2])
    columns = jnp.where(flip, columns[::-1], columns)  # [w, T]
    rows = resize_matrix(box[0], box[2], size[0], canvas.shape[1])  # [h, S]
    wide = clamp(jnp.einsum("cst,wt->csw", canvas, columns, precision=lax.Precision.DEFAULT))  # [C, S, w]
    return clamp(jnp.einsum("csw,hs->chw", wide, rows, precision=lax.Precision.DEFAULT))  # [C, h, w]


def luma(image: Float[Array, "3 H W"]) -> Float[Array, "H W"]:
    """PIL's L of an RGB image."""
    return LUMA[0] * image[0] + LUMA[1] * image[1] + LUMA[2] * image[2]


def gray(image: Float[Array, "3 H W"]) -> Float[Array, "3 H W"]:
    """The image without colour, as three equal channels."""
    return jnp.broadcast_to(luma(image), image.shape)


def shift_hue(image: Float[Array, "3 H W"], turns: Float[Array, ""]) -> Float[Array, "3 H W"]:
    """Turns the hue as torchvision does through PIL's 8-bit HSV, whose bytes are cut off, not rounded.

    A full turn is 255 levels of hue on conversion but 256 on wrapping, and the shift is cut towards zero: kept, since
    every published run had them.
    """
    red, green, blue = image
    value = image.max(axis=0)
    chroma = value - image.min(axis=0)
    coloured = chroma > 0.0
    safe = jnp.where(coloured, chroma, 1.0)
    sector = jnp.where(
        red == value,
        (green - blue) / safe,
        jnp.where(green == value, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = jnp.floor((sector / 6.0 % 1.0) * 255.0)  # [H, W], 0..255
    saturation = jnp.floor(chroma / jnp.where(coloured, value, 1.0) * 255.0) / 255.0
    hue = (hue + jnp.trunc(turns * 255.0)) % 256.0 * (6.0 / 255.0)  # 0..6
    ramp = (jnp.asarray([5.0, 3.0, 1.0])[:, None, None] + hue) % 6.0  # [3, H, W]
    return value - value * saturation * jnp.clip(jnp.minimum(ramp, 4.0 - ramp), 0.0, 1.0)


def adjust(image: Float[Array, "3 H W"], operation: Int[Array, ""], factor: Float[Array, ""]) -> Float[Array, "3 H W"]:
    """One operation of the colour jitter: a blend away from black, the mean gray or the gray picture; or the hue."""
    grayscale = luma(image)
    reference = jnp.where(operation == SATURATION, grayscale, jnp.floor(grayscale.mean() + 0.5))  # [H, W]
    reference = jnp.where(operation == BRIGHTNESS, 0.0, reference)
    blended = clamp(factor * image + (1.0 - factor) * reference)
    turned = jnp.where(factor == 0.0, image, shift_hue(image, factor))  # no shift, no passage through 8-bit HSV
    return jnp.where(operation == HUE, turned, blended)


def jitter(image: Float[Array, "3 H W"], order: Int[Array, "4"], factors: Float[Array, "4"]) -> Float[Array, "3 H W"]:
    """Brightness, contrast, saturation and hue in the given order; `factors` are numbered as the operations are."""
    for position in range(4):
        image = adjust(image, order[position], factors[order[position]])
    return image


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
    box = box / (2.0 * half + 1.0)
    twice = jnp.matmul(box, box, precision=lax.Precision.HIGHEST)
    return jnp.matmul(twice, box, precision=lax.Precision.HIGHEST)


def blur(image: Image, radius: Float[Array, ""]) -> Image:
    """PIL's GaussianBlur; radius 0 changes nothing."""
    _, height, width = image.shape
    columns = blur_matrix(radius, width)
    rows = columns if height == width else blur_matrix(radius, height)
    image = jnp.einsum("chw,vw->chv", image, columns, precision=lax.Precision.DEFAULT)
    return jnp.einsum("chv,uh->cuv", image, rows, precision=lax.Precision.DEFAULT)


def solarize(image: Image, threshold: int) -> Image:
    """Inverts the values that PIL's 8 bits would round to `threshold` or more."""
    return jnp.where(image >= threshold - 0.5, 255.0 - image, image)


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype) -> Array:
    """Values 0..255 with channels last to zero mean and unit variance; float32 inside, `dtype` out."""
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)
