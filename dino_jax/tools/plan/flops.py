"""The FLOPs of a training step, counted from the sizes: what the compiler's count is compared with."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.models import build_network
from dino_jax.models.network import Outputs
from dino_jax.objectives.objective import make_objectives


def step_flops(config: ConfigDict, rows: float, model_ways: int = 1) -> float | None:
    """Floating-point operations of one device in one step on `rows` images; None for a backbone without a count.

    Matrix products only, a multiplication and an addition each: teacher forward on 2 global crops; student forward on
    all, and backward at twice the forward (once for the patches, whose input needs no gradient); another forward of the
    blocks with `run.remat=blocks`. The prototypes are shared by `model_ways` devices.
    """
    network, crops = build_network(config), config.crops
    backbone, head = network.backbone, network.head
    globals_ = backbone.flops(*crops.global_size)
    locals_ = backbone.flops(*crops.local_size) if crops.local_count else (0.0, 0.0)
    if globals_ is None or locals_ is None:
        return None
    patches, blocks = (2 * whole + crops.local_count * part for whole, part in zip(globals_, locals_, strict=True))
    count = 2 + crops.local_count
    crop_head = _head(head, backbone.embed_dim, model_ways)
    at_once = rows / config.run.accum_steps

    def shaped(width: float) -> Any:
        return jax.ShapeDtypeStruct((at_once, count, width), jnp.float32)

    outputs = Outputs(cls=shaped(backbone.embed_dim), logits=shaped(head.out_dim / model_ways))
    objectives = sum(term.flops(outputs) for term in make_objectives(config)) / at_once
    recomputed = blocks if config.run.remat == "blocks" else 0
    student = 2 * patches + 3 * (blocks + crop_head * count) + objectives + recomputed
    teacher = 2 * sum(globals_) + 2 * crop_head
    return rows * (student + teacher)


def _head(head: Any, width: int, model_ways: int) -> float:
    """Forward FLOPs of the projection head on one crop."""
    sizes = [width, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
    mlp = sum(a * b for a, b in itertools.pairwise(sizes))
    return 2 * (mlp + head.bottleneck_dim * head.out_dim / model_ways)
