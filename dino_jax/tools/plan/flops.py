"""The FLOPs of a training step of a ViT, counted from its sizes: what the compiler's count is held against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.models import ViT, build_network
from dino_jax.models.network import Outputs
from dino_jax.objectives.objective import make_objectives


def step_flops(config: ConfigDict, rows: float, model_ways: int = 1) -> float | None:
    """Floating-point operations of one device in one step on `rows` images; None for a backbone that is no ViT.

    Matrix products only, a multiplication and an addition each: teacher forward on 2 global crops; student forward on
    all, and backward at twice the forward (once for the patches, whose input needs no gradient); another forward of the
    blocks with `run.remat=blocks`. The prototypes are shared by `model_ways` devices.
    """
    network, crops = build_network(config), config.crops
    vit, head = network.backbone, network.head
    if not isinstance(vit, ViT):
        return None
    sizes = [tuple(crops.global_size)] * 2
    crop_sizes = sizes + [tuple(crops.local_size)] * crops.local_count
    patches, blocks = _backbone(vit, crop_sizes)
    crop_head = _head(head, vit.embed_dim, model_ways)
    at_once = rows / config.run.accum_steps

    def shaped(width: float) -> Any:
        return jax.ShapeDtypeStruct((at_once, len(crop_sizes), width), jnp.float32)

    outputs = Outputs(cls=shaped(vit.embed_dim), logits=shaped(head.out_dim / model_ways))
    objectives = sum(term.flops(outputs) for term in make_objectives(config)) / at_once
    recomputed = blocks if config.run.remat == "blocks" else 0
    student = 2 * patches + 3 * (blocks + crop_head * len(crop_sizes)) + objectives + recomputed
    teacher = sum(_backbone(vit, sizes)) + 2 * crop_head
    return rows * (student + teacher)


def _backbone(vit: ViT, crop_sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Forward FLOPs of the patch embedding, and of the blocks, on crops of these sizes."""
    width, patch = vit.embed_dim, vit.patch_size
    counts = [(height // patch) * (wide // patch) for height, wide in crop_sizes]  # patches of each crop
    patches = 2 * sum(counts) * patch * patch * vit.in_chans * width
    tokens = [count + 1 for count in counts]
    linear = 2 * 12 * width * width * sum(tokens)  # qkv 3, projection 1, MLP 4 + 4
    attention = 2 * 2 * width * sum(n * n for n in tokens)  # query by key, weights by value
    return patches, vit.depth * (linear + attention)


def _head(head: Any, width: int, model_ways: int) -> float:
    """Forward FLOPs of the projection head on one crop."""
    sizes = [width, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
    mlp = sum(a * b for a, b in itertools.pairwise(sizes))
    return 2 * (mlp + head.bottleneck_dim * head.out_dim / model_ways)
