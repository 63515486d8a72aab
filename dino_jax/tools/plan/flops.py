"""Analytic FLOPs of a training step, to compare with the compiler's count."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.data.masking import make_masking
from dino_jax.models import build_network
from dino_jax.models.network import Outputs
from dino_jax.objectives.objective import make_objectives


def step_flops(config: ConfigDict, rows: float, model_ways: int = 1) -> float | None:
    """FLOPs of one device in one step on `rows` images; None for a backbone without a count.

    Matrix products only, with multiplications and additions counted separately:
      teacher: forward on 2 global crops.
      patch heads: with an objective on patches, forward of the teacher's and the student's, and its backward.
      student: forward on all crops; backward at twice the forward (once for the patch embedding, whose input needs no
        gradient); another forward of the blocks with `run.remat=blocks`.
    The prototypes are split over `model_ways` devices.
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
    terms, masking, patch_heads = make_objectives(config), make_masking(config), 0.0
    if masking is not None:
        reader = network.patch_head or head
        every = any(term.patches == "all" for term in terms)
        read = 2 * at_once * masking.patches if every else masking.capacity(round(at_once))
        shape = jax.ShapeDtypeStruct((read, reader.out_dim / model_ways), jnp.float32)
        outputs = outputs._replace(patch_logits=shape)
        patch_heads = 4 * _head(reader, backbone.embed_dim, model_ways) * read / at_once  # student 3, teacher 1
    objectives = sum(term.flops(outputs) for term in terms) / at_once
    recomputed = blocks if config.run.remat == "blocks" else 0
    student = 2 * patches + 3 * (blocks + crop_head * count) + objectives + recomputed
    teacher = 2 * sum(globals_) + 2 * crop_head
    return rows * (student + teacher + patch_heads)


def _head(head: Any, width: int, model_ways: int) -> float:
    """Forward FLOPs of the projection head on one crop."""
    sizes = [width, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
    mlp = sum(a * b for a, b in itertools.pairwise(sizes))
    return 2 * (mlp + head.bottleneck_dim * head.out_dim / model_ways)
