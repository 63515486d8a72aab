"""The network: backbone and head over the crops of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.models.layers import Array


class Outputs(NamedTuple):
    """The network's outputs for each crop, from which the objectives are computed."""

    cls: Array  # [B, C, D], the backbone's feature before the head, in the compute type
    logits: Array  # [B, C, K], in at least float32


class Network(nn.Module):
    """Crops -> `Outputs`: one backbone pass per resolution, one head pass over all crops.

    Crops are flattened batch-major ([B, C, ...] -> [B * C, ...]), so that a batch sharded over devices stays where it
    is. Batch norm sees each resolution in turn in the backbone (globals first) and all crops at once in the head.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(
        self,
        crops: Sequence[Float[Array | np.ndarray, "B _ _ _ c"]],
        drop_path: Float[Array, "depth branches B C"] | None = None,
        train: bool = False,
    ) -> Outputs:
        """`crops`: one [B, C_i, h, w, c] per resolution; `drop_path` [depth, 2, B, C] or None, C = sum of C_i."""
        features, first = [], 0
        for images in crops:
            batch, count = images.shape[:2]
            keep = None
            if drop_path is not None:
                keep = drop_path[..., first : first + count]
                keep = keep.reshape(*keep.shape[:2], batch * count)  # [depth, 2, B, C_i] -> [depth, 2, B*C_i]
            out = self.backbone(images.reshape(batch * count, *images.shape[2:]), keep, train)
            features.append(out.reshape(batch, count, -1))  # [B*C_i, D] -> [B, C_i, D]
            first += count
        stacked = jnp.concatenate(features, axis=1)  # [B, C, D]
        logits = self.head(stacked.reshape(-1, stacked.shape[-1]), train)  # [B*C, K]
        return Outputs(stacked, logits.reshape(*stacked.shape[:2], -1))
