"""Backbones, the projection head, and the network of both.

`BACKBONES` is the only registry; `backbone.Backbone` is the interface. A new backbone is a file here and a line in the
registry.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.errors import UserError, did_you_mean
from dino_jax.models.attention import can_fuse_attention
from dino_jax.models.backbone import Backbone, Tokens
from dino_jax.models.head import Head
from dino_jax.models.layers import patch_grid
from dino_jax.models.network import Network
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.resnet import ResNet
from dino_jax.models.vit import ViT
from dino_jax.models.xcit import XCiT

__all__ = [
    "BACKBONES",
    "Backbone",
    "Head",
    "Network",
    "ResNet",
    "Tokens",
    "ViT",
    "XCiT",
    "build_backbone",
    "build_head",
    "build_network",
    "resize_pos_embed",
]

BACKBONES = {
    "vit_tiny": partial(ViT, embed_dim=192, depth=12, heads=3),
    "vit_small": partial(ViT, embed_dim=384, depth=12, heads=6),
    "vit_base": partial(ViT, embed_dim=768, depth=12, heads=12),
    "vit_large": partial(ViT, embed_dim=1024, depth=24, heads=16),
    "vit_giant2": partial(ViT, embed_dim=1536, depth=40, heads=24, ffn="swiglu"),
    "vit_small_plus": partial(ViT, embed_dim=384, depth=12, heads=6, ffn="swiglu", ffn_dim=1536),
    "vit_huge_plus": partial(ViT, embed_dim=1280, depth=32, heads=20, ffn="swiglu", ffn_dim=5120),
    "vit_7b": partial(ViT, embed_dim=4096, depth=40, heads=32, ffn="swiglu", ffn_dim=8192),
    "resnet18": partial(ResNet, stages=(2, 2, 2, 2), bottleneck=False),
    "resnet50": partial(ResNet, stages=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, stages=(3, 4, 23, 3), bottleneck=True),
    "xcit_small_12": partial(XCiT, embed_dim=384, depth=12, heads=8, eta=1.0),
    "xcit_medium_24": partial(XCiT, embed_dim=512, depth=24, heads=8, eta=1e-5),
}

# Config keys that not every family has.
_VARIATIONS = (
    *("embed_dim", "depth", "heads", "init_std", "small_stem", "registers"),
    *("ffn", "ffn_dim", "layer_scale", "positions", "qkv_bias", "norm_eps", "masking"),
)


def build_backbone(
    model: ConfigDict, image_size: int | tuple[int, int], remat: str = "none", attention: str = "plain"
) -> Backbone:
    """Builds the backbone of `config.model` for inputs of `image_size` (height, width); other sizes work too.

    `remat` and `attention` are those of `config.run`. Raises `UserError` for an unknown name, a key that the model
    does not have, a size that does not fit the patch, or `attention=fused` on hardware or settings without it.
    """
    constructor = _choice("model.name", model.name, BACKBONES)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    variations = {key: model[key] for key in _VARIATIONS if model[key] not in (None, False)}
    options = {
        "patch_size": model.patch_size,
        "image_size": (height, width),
        "in_chans": model.in_chans,
        "remat": _choice("run.remat", remat, {"none": False, "blocks": True}),
        **_numerics(model),
        **variations,
    }
    fields = {field.name for field in dataclasses.fields(constructor.func)}
    if foreign := [key for key in variations if key not in fields]:
        raise UserError(f"model.{foreign[0]} does not apply to {model.name}: leave it out")
    backbone = constructor(**{key: value for key, value in options.items() if key in fields})
    if "patch_size" in fields:
        patch_grid(height, width, backbone.patch_size)
        if backbone.embed_dim % backbone.heads:
            raise UserError(f"model.embed_dim {backbone.embed_dim} is not divisible by model.heads {backbone.heads}")
    if "fused" in fields:
        possible = can_fuse_attention(backbone.dtype, backbone.embed_dim // backbone.heads)
        fused = _choice("run.attention", attention, {"auto": possible, "plain": False, "fused": True})
        if fused and not possible:
            raise UserError(
                "run.attention=fused needs an NVIDIA GPU (Ampere or newer), model.dtype=bfloat16 and heads whose width "
                "is a multiple of 8 up to 128: set it to auto"
            )
        backbone = backbone.clone(fused=fused)
    return backbone


def build_head(config: ConfigDict) -> Head:
    """Builds the projection head of `config.head`, with the dtype and precision of `config.model`."""
    return Head(**{key: config.head[key] for key in config.head}, **_numerics(config.model))


def build_patch_head(config: ConfigDict) -> Head | None:
    """Builds the head that reads patches, if the iBOT term has one of its own.

    Raises:
      UserError: the backbone has no mask token, or settings of an own head for a shared one.
    """
    settings = config.objective.ibot
    sizes = {key: settings[key] for key in ("out_dim", "hidden_dim", "bottleneck_dim", "layers")}
    if not settings.weight:
        return None
    if not config.model.masking:
        raise UserError("objective.ibot.weight: the backbone has no mask token: set model.masking=True")
    if settings.shared_head:
        if foreign := [key for key, value in sizes.items() if value is not None]:
            raise UserError(
                f"objective.ibot.{foreign[0]} is for a head of its own: set objective.ibot.shared_head=False"
            )
        return None
    own = {key: value for key, value in sizes.items() if value is not None}
    return Head(**{key: config.head[key] for key in config.head} | own, **_numerics(config.model))


def build_network(config: ConfigDict) -> Network:
    """Builds backbone and head from a whole run's configuration; the position table fits `config.crops.global_size`."""
    run = config.run
    whole = run.attention != "auto" or run.mesh.model == 1  # `model` axis: it would have to sum gradients
    backbone = build_backbone(config.model, config.crops.global_size, run.remat, run.attention if whole else "plain")
    if backbone.patch_size is not None and config.crops.local_count:
        height, width = config.crops.local_size
        patch_grid(height, width, backbone.patch_size)
    return Network(backbone, build_head(config), build_patch_head(config))


def _numerics(model: ConfigDict) -> dict:
    dtypes = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float64")}
    if model.dtype == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError("model.dtype=float64 would compute in float32: set JAX_ENABLE_X64=1 in the environment")
    precisions = {"default": None, "high": "high", "highest": "highest"}  # None: JAX's own setting
    return {
        "dtype": _choice("model.dtype", model.dtype, dtypes),
        "precision": _choice("model.precision", model.precision, precisions),
    }


def _choice(key: str, name: str, table: dict) -> Any:
    if name in table:
        return table[name]
    raise UserError(f"{key}={name!r} is unknown: choose one of {', '.join(table)}{did_you_mean(name, table)}")
