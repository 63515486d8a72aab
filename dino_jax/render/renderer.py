"""Crops on the accelerator: from the host's uint8 batch to normalized crops in compute dtype, before the train step.

Two modes with one entry, chosen by `config.data.render`; `data/pipeline.py` describes the arrays of either batch:

- `host`: PIL rendered the crops; only their normalization happens here.
- `device`: the host decoded the images and drew the parameters; all of the augmentation happens here.

Legend: B batch, C crops (2 global ones first), c channels, S side of the canvas, h and w of a crop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from dino_jax.data.crops import CropParams
from dino_jax.render import ops

Crops = list[Array]  # [B, 2, H, W, c] and, if there are local crops, [B, n, h, w, c]

CHUNK = 32  # images that a device renders at once: enough to fill it, few enough to bound the memory


def make_renderer(
    config: ConfigDict, sharding: jax.sharding.NamedSharding | None = None
) -> Callable[[Mapping[str, Any]], Crops]:
    """The jitted `render(batch) -> [globals [B, 2, H, W, c], locals [B, n, h, w, c]]`, in `config.model.dtype`.

    `sharding` splits the batch axis, of the arrays and of the crops; each device renders its own images and nothing is
    communicated. Other arrays of the batch, such as labels, are ignored. The same parameters give the same crops as
    `data.crops.render_crops`, up to PIL's rounding (see `render.ops`).
    """
    render = functools.partial({"host": _normalize_batch, "device": _render_batch}[config.data.render], config)
    if sharding is not None:
        render = jax.shard_map(render, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    return jax.jit(render)


def _normalize_batch(config: ConfigDict, batch: Mapping[str, Any]) -> Crops:
    """Host mode: normalization alone."""
    crops = [batch["globals"], batch["locals"]] if config.crops.local_count else [batch["globals"]]
    return [_normalize(config, images) for images in crops]


def _render_batch(config: ConfigDict, batch: Mapping[str, Any]) -> Crops:
    """Device mode: every crop of every image, `CHUNK` images at a time."""
    images = (batch["canvas"], batch["params"])
    return jax.lax.map(lambda image: _render_image(config, *image), images, batch_size=CHUNK)


def _render_image(config: ConfigDict, canvas: Array, params: CropParams) -> Crops:
    """All crops of one image: canvas uint8 [S, S, c] and parameters [C, ...] -> [2, H, W, c] and [n, h, w, c]."""
    planar = jnp.moveaxis(canvas, -1, 0).astype(config.model.dtype)  # [S, S, c] -> [c, S, S]
    groups = [(slice(0, 2), config.crops.global_size), (slice(2, None), config.crops.local_size)]
    crops = []
    for crop_range, size in groups[: 2 if config.crops.local_count else 1]:
        render = functools.partial(_render_crop, planar, tuple(size), config.crops.solarize_threshold)
        images = jax.vmap(render)(jax.tree.map(lambda x, crop_range=crop_range: x[crop_range], params))  # [C, h, w, c]
        crops.append(_normalize(config, images))
    return crops


def _render_crop(
    canvas: Float[Array, "c S S"], size: tuple[int, int], threshold: int, crop: Any
) -> Float[Array, "h w c"]:
    """One crop, values 0..255. Images that are not RGB are only resampled and mirrored."""
    planes = list(ops.resample(canvas, crop.box, crop.flip, size))
    if len(planes) == 3:
        planes = _select(crop.jitter, ops.jitter(planes, crop.order, crop.factors), planes)
        planes = _select(crop.gray, ops.gray(planes), planes)
        planes = ops.blur(planes, crop.blur)
        planes = _select(crop.solarize, [ops.solarize(plane, threshold) for plane in planes], planes)
    return jnp.stack(planes, axis=-1)


def _select(chosen: Bool[Array, ""], changed: ops.RGB, planes: ops.RGB) -> ops.RGB:
    return [jnp.where(chosen, new, old) for new, old in zip(changed, planes, strict=True)]


def _normalize(config: ConfigDict, images: Array) -> Array:
    return ops.normalize(images, config.data.mean, config.data.std, jnp.dtype(config.model.dtype))
