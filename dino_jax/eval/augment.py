"""The augmentation of DeiT (Touvron et al. 2021): RandAugment on the host, erasing, mixup and CutMix on the device.

No maintained library offers these without torch or TensorFlow. RandAugment (Cubuk et al. 2020) uses PIL with the
strengths of timm's `rand-m9-mstd0.5-inc1`, mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) make one draw per
batch and mix it with the reversed batch, and random erasing (Zhong et al. 2020) fills with normal noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float, float, Image.Resampling], Image.Image]
GRAY = (124, 116, 104)  # fill color outside the image: ImageNet's mean
TRIES = 10  # boxes tried before giving up on erasing an image


def _affine(image: Image.Image, matrix: tuple[float, ...], how: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=GRAY)


def _add_below_128(image: Image.Image, amount: int) -> Image.Image:
    return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda p, share, sign, how: kind(p).enhance(max(0.1, 1 + 0.9 * share * sign))


# Each takes an image, a strength in 0..1, a random sign and a resampling filter.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda p, share, sign, how: ImageOps.autocontrast(p),
    "equalize": lambda p, share, sign, how: ImageOps.equalize(p),
    "invert": lambda p, share, sign, how: ImageOps.invert(p),
    "rotate": lambda p, share, sign, how: p.rotate(30 * share * sign, resample=how, fillcolor=GRAY),
    "posterize": lambda p, share, sign, how: ImageOps.posterize(p, max(1, 4 - int(4 * share))),
    "solarize": lambda p, share, sign, how: ImageOps.solarize(p, 256 - int(256 * share)),
    "solarize_add": lambda p, share, sign, how: _add_below_128(p, int(110 * share)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda p, share, sign, how: _affine(p, (1, 0.3 * share * sign, 0, 0, 1, 0), how),
    "shear_y": lambda p, share, sign, how: _affine(p, (1, 0, 0, 0.3 * share * sign, 1, 0), how),
    "translate_x": lambda p, share, sign, how: _affine(p, (1, 0, 0.45 * share * sign * p.width, 0, 1, 0), how),
    "translate_y": lambda p, share, sign, how: _affine(p, (1, 0, 0, 0, 1, 0.45 * share * sign * p.height), how),
}


def rand_augment(
    pixels: np.ndarray, rng: np.random.Generator, magnitude: float, *, count: int = 2, spread: float = 0.5
) -> np.ndarray:
    """Applies `count` random operations with probability 0.5 each and strength N(magnitude, spread) out of 10.

    uint8 [H, W, 3] -> uint8 [H, W, 3]; images with other channel counts are returned unchanged.
    """
    if pixels.shape[-1] != 3:
        return pixels
    image = Image.fromarray(pixels)
    for name in rng.choice(list(OPERATIONS), count):
        applied, sign = rng.random() < 0.5, 1.0 if rng.random() < 0.5 else -1.0
        share = float(np.clip(rng.normal(magnitude, spread), 0, 10)) / 10
        how = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
        if applied:
            image = OPERATIONS[name](image, share, sign, how)
    return np.asarray(image)


class Mix(NamedTuple):
    """How a batch is mixed with its reverse; mixup has an empty `box`, CutMix `blend` 1."""

    share: np.float32  # of an image in its own target
    blend: np.float32  # of an image in its own pixels, outside the box
    box: np.ndarray  # [4] int32: top, left, bottom, right; CutMix takes the other image inside


def draw_mix(rng: np.random.Generator, height: int, width: int, mixup: float, cutmix: float) -> Mix:
    """Draws mixup or CutMix for a batch, with even chance if both alphas are positive; shares are beta-distributed."""
    nothing = np.zeros(4, np.int32)
    if mixup <= 0 and cutmix <= 0:
        return Mix(np.float32(1), np.float32(1), nothing)
    cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    share = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
    if not cut:
        return Mix(np.float32(share), np.float32(share), nothing)
    tall, wide = (int(side * np.sqrt(1 - share)) for side in (height, width))
    top, left = rng.integers(height) - tall // 2, rng.integers(width) - wide // 2
    box = np.array([max(top, 0), max(left, 0), min(top + tall, height), min(left + wide, width)], np.int32)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return Mix(np.float32(1 - area / (height * width)), np.float32(1), box)


def mix_batch(images: jax.Array, targets: jax.Array, valid: jax.Array, mix: Mix) -> tuple[jax.Array, jax.Array]:
    """Mixes images [B, h, w, C] and targets [B, K] with the reversed batch, except rows with an invalid partner."""
    partner, pairs = images[::-1], valid[::-1]
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])[None]
    inside = (rows >= mix.box[0]) & (rows < mix.box[2]) & (columns >= mix.box[1]) & (columns < mix.box[3])  # [h, w]
    own = jnp.where(inside, 0.0, mix.blend)[None, :, :, None]
    own = jnp.where(pairs[:, None, None, None], own, 1.0)
    share = jnp.where(pairs, mix.share, 1.0)[:, None]
    return images * own + partner * (1 - own), targets * share + targets[::-1] * (1 - share)


def smoothed(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Smoothed one-hot targets [B, K]: `smoothing` is spread over all classes."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing of normalized images [B, h, w, C]: a box of 2 to 33% of the area becomes normal noise."""
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (batch, TRIES), minval=0.02, maxval=1 / 3) * height * width
    aspect = jnp.exp(jax.random.uniform(keys[1], (batch, TRIES), minval=jnp.log(0.3), maxval=jnp.log(1 / 0.3)))
    tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (tall < height) & (wide < width)  # [B, tries]
    first = jnp.argmax(fits, axis=1)[:, None]
    tall, wide = (jnp.take_along_axis(x, first, 1) for x in (tall, wide))  # [B, 1]
    place = jax.random.uniform(keys[2], (2, batch, 1))
    top, left = jnp.floor(place[0] * (height - tall + 1)), jnp.floor(place[1] * (width - wide + 1))
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside = ((rows >= top) & (rows < top + tall))[:, :, None] & ((columns >= left) & (columns < left + wide))[:, None]
    chosen = (jax.random.uniform(keys[3], (batch,)) < probability) & fits.any(1)
    noise = jax.random.normal(keys[4], images.shape, images.dtype)
    return jnp.where((inside & chosen[:, None, None])[..., None], noise, images)
