"""Multi-crop augmentation: a sampler of parameters, and their rendering by PIL.

The renderer on the accelerator (`render`) shares the sampler. The recipe is the paper's
(arXiv 2104.14294, section 3.1 and appendix), each operation as torchvision applies it to PIL images: random resized
crop (bicubic), flip, color jitter in random order, gray, Gaussian blur, solarize. C = 2 + n crops, globals first;
c channels. Color operations, blur and solarize need RGB; other images are only cropped and flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_jax.data.decode import MANY_BYTES

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # factors of brightness, contrast, saturation, hue that change nothing
TRIES = 10  # boxes drawn before falling back to the center of the image


class CropParams(NamedTuple):
    """The augmentation parameters of one image's crops; every array has the leading axis C, after any batch axis.

    box int32 [C, 4]: top, left, height, width in pixels. flip bool [C]: mirror left to right. order int32 [C, 4]: the
    operations of the color jitter as applied (0 brightness, 1 contrast, 2 saturation, 3 hue). factors float32 [C, 4]:
    their strengths, by operation number; 1, 1, 1, 0 change nothing; the hue's is in turns. jitter bool [C]: whether the
    color jitter applies. gray bool [C]. blur float32 [C]: radius in pixels, 0 for none. solarize bool [C].
    """

    box: np.ndarray
    flip: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    jitter: np.ndarray
    gray: np.ndarray
    blur: np.ndarray
    solarize: np.ndarray


def draw_crops(rng: np.random.Generator, height: int, width: int, crops: Any, color: bool = True) -> CropParams:
    """Draws the parameters of every crop of one image of `height` x `width` pixels.

    `crops` is `config.crops` or anything with its attributes. The number of draws from `rng` depends only on the number
    of crops. With `color` off (images that are not RGB) only box and flip are drawn.
    """
    return CropParams(*(values[0] for values in draw_many([rng], np.array([[height, width]]), crops, color)))


def draw_many(rngs: Sequence[np.random.Generator], sizes: np.ndarray, crops: Any, color: bool = True) -> CropParams:
    """`draw_crops` of several images, each from its own generator; every array has a leading axis for them.

    `sizes`: height and width of each image [b, 2]. Vectorized, since each NumPy call is expensive.
    """
    count = 2 + crops.local_count
    draws = np.stack([rng.random((count, 4 * TRIES + 14)) for rng in rngs])  # [b, C, .] uniform in [0, 1)
    kinds = np.minimum(np.arange(count), 2)  # first global, second global, local
    scale = np.array([crops.global_scale, crops.global_scale, crops.local_scale])[kinds]  # [C, 2]
    height, width = np.repeat(sizes, count, axis=0).T  # [b * C]
    tries = draws[..., 14:].reshape(-1, TRIES, 4)
    box = draw_boxes(tries, height, width, np.tile(scale, (len(rngs), 1)), crops.ratio).reshape(-1, count, 4)
    flip = draws[..., 0] < crops.flip_prob
    jitter = (draws[..., 1] < crops.jitter_prob) & color
    gray = (draws[..., 2] < crops.gray_prob) & color
    blurred = (draws[..., 3] < np.array(crops.blur_prob)[kinds]) & color
    low, high = crops.blur_radius
    blur = np.where(blurred, low + (high - low) * draws[..., 4], 0).astype(np.float32)
    solarize = (draws[..., 5] < np.array(crops.solarize_prob)[kinds]) & color
    order = draws[..., 6:10].argsort(axis=-1).astype(np.int32)  # a uniform permutation
    spread = np.array([crops.brightness, crops.contrast, crops.saturation, crops.hue])
    lower = np.array(NEUTRAL) - spread
    lower[:3] = np.maximum(lower[:3], 0)
    factors = lower + (np.array(NEUTRAL) + spread - lower) * draws[..., 10:14]
    factors = np.where(jitter[..., None], factors, NEUTRAL).astype(np.float32)
    return CropParams(box, flip, order, factors, jitter, gray, blur, solarize)


def draw_boxes(
    draws: np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
    scale: np.ndarray,
    ratio: tuple[float, float],
) -> np.ndarray:
    """The box rule of torchvision's `RandomResizedCrop.get_params`, for C crops at once.

    Args:
      draws: uniform numbers in [0, 1) [C, tries, 4]: area, aspect ratio, vertical and horizontal place.
      height, width: of the image, or of each crop's image [C].
      scale: lowest and highest share of the area [C, 2].
      ratio: lowest and highest width / height, drawn log-uniformly.
    Returns:
      int32 [C, 4]: top, left, height, width of the first try that fits, or the center at the nearest allowed ratio.
    """
    height, width = (np.broadcast_to(side, len(draws)) for side in (height, width))
    area = (height * width)[:, None] * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * draws[..., 0])  # [C, tries]
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[..., 1])
    wide = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tall = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (wide > 0) & (wide <= width[:, None]) & (tall > 0) & (tall <= height[:, None])
    pick = np.arange(len(draws)), fits.argmax(axis=1)  # the first that fits
    tall, wide, place = tall[pick], wide[pick], draws[pick]
    top = (place[:, 2] * (height - tall + 1)).astype(np.int64)
    left = (place[:, 3] * (width - wide + 1)).astype(np.int64)
    boxes = np.stack([top, left, tall, wide], axis=1)
    for crop in np.flatnonzero(~fits[pick]):
        boxes[crop] = center_box(int(height[crop]), int(width[crop]), ratio)
    return boxes.astype(np.int32)


def center_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest centered box whose width / height lies within `ratio`: top, left, height, width."""
    tall, wide = height, width
    if width / height < min(ratio):
        tall = round(width / min(ratio))
    elif width / height > max(ratio):
        wide = round(height * max(ratio))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def render_crops(image: np.ndarray, params: CropParams, crops: Any) -> tuple[np.ndarray, np.ndarray]:
    """Renders the crops of one image, uint8 [H, W, c], with PIL.

    Returns:
      global crops uint8 [2, *global_size, c] and local crops uint8 [n, *local_size, c].
    """
    large = np.empty((2, *crops.global_size, image.shape[-1]), np.uint8)
    small = np.empty((crops.local_count, *crops.local_size, image.shape[-1]), np.uint8)
    whole = to_pil(image) if image.nbytes < MANY_BYTES else None
    for i, out in enumerate([*large, *small]):
        rendered = cut_resize(image, whole, params.box[i], out.shape[:2])
        if params.flip[i]:
            rendered = [flip(plane) for plane in rendered]
        if image.shape[-1] == 3:
            out[:] = np.asarray(render_color(rendered[0], CropParams(*(p[i] for p in params)), crops))
        else:
            out[:] = np.stack([np.asarray(plane) for plane in rendered], axis=-1)
    return large, small


def render_color(image: Image.Image, params: CropParams, crops: Any) -> Image.Image:
    """Jitter, gray, blur and solarize one RGB crop; `params` without the crop axis."""
    if params.jitter:
        for operation in params.order:
            factor = float(params.factors[operation])
            if factor != NEUTRAL[operation]:
                image = JITTER[operation](image, factor)
    if params.gray:
        image = gray(image)
    if params.blur > 0:
        image = blur(image, float(params.blur))
    if params.solarize:
        image = solarize(image, crops.solarize_threshold)
    return image


def to_pil(image: np.ndarray) -> list[Image.Image]:
    """uint8 [H, W, c] -> one RGB image for three channels, else one gray image for each channel."""
    if image.shape[-1] == 3:
        return [Image.fromarray(image)]
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]


def cut_resize(
    image: np.ndarray, whole: Sequence[Image.Image] | None, box: np.ndarray, size: tuple[int, int]
) -> list[Image.Image]:
    """`crop_resize` of every image in `whole` (`to_pil`); without it channel by channel, in less memory."""
    if whole is not None:
        return [crop_resize(plane, box, size) for plane in whole]
    top, left, height, width = (int(value) for value in box)
    cut = image[top : top + height, left : left + width]
    channels = [Image.fromarray(np.ascontiguousarray(cut[..., c])) for c in range(image.shape[-1])]
    resized = [crop_resize(channel, (0, 0, height, width), size) for channel in channels]
    return [Image.merge("RGB", resized)] if len(resized) == 3 else resized


def crop_resize(image: Image.Image, box: Sequence[int] | np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Cuts out the box (top, left, height, width), then resizes it to `size` (height, width), bicubic and antialiased.

    The cut comes first, as in torchvision: pixels outside the box have no influence.
    """
    top, left, height, width = (int(value) for value in box)
    cut = image.crop((left, top, left + width, top + height))
    return cut.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def flip(image: Image.Image) -> Image.Image:
    """Mirrors left to right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with black: factor 0 is black, 1 the image."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the flat gray of the image's mean luma, rounded to a whole level."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the image's luma."""
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Turns the hue by `shift` turns in PIL's 8-bit HSV; the shift is cut to whole 255ths toward zero (torchvision)."""
    steps = int(shift * 255)
    channels = image.convert("HSV").split()
    turned = channels[0].point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, *channels[1:])).convert("RGB")


def gray(image: Image.Image) -> Image.Image:
    """The luma (ITU-R 601-2) in all three channels."""
    return image.convert("L").convert("RGB")


def blur(image: Image.Image, radius: float) -> Image.Image:
    """PIL's Gaussian blur: three box blurs whose joint standard deviation is `radius` pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius=radius))


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Inverts the levels at or above `threshold` (0 to 255)."""
    return ImageOps.solarize(image, threshold)


JITTER = (brightness, contrast, saturation, hue)
