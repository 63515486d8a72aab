"""The network: backbone and heads over the crops of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dino_jax.models.layers import Array


class Views(NamedTuple):
    """What a step reads: the crops of a batch and, for terms on patches, the masks of the global ones."""

    crops: Sequence[Any]  # [B, C_i, h, w, c] per resolution, the 2 global crops first
    masked: Any = None  # bool [B, 2, N]


class Chosen(NamedTuple):
    """The patches of the global crops that a head reads, flattened over [B, 2, N] and padded to a fixed number M."""

    place: Array  # int32 [M]
    masked: Array  # bool [M]: whether the patch is masked; False for padding too
    weight: Array  # [M]: 1 / number of masked patches in its crop; 0 where not masked


class Outputs(NamedTuple):
    """The network's outputs for each crop, from which the objectives are computed."""

    cls: Array  # [B, C, D], the backbone's feature before the head, in the compute type
    logits: Array  # [B, C, K], in at least float32
    patches: Any = None  # [B, 2, N, D], patch tokens of the global crops after the final norm; None: not asked for
    patch_logits: Any = None  # [M, K'], of the chosen patches
    chosen: Any = None  # `Chosen`


def choose(masked: Bool[Array | np.ndarray, "B 2 N"], capacity: int | None) -> Chosen:
    """The masked patches, at most `capacity` (`data.masking.Masking.capacity`) of them; None: all patches."""
    masked = jnp.asarray(masked)
    flat = masked.ravel()
    weight = (masked / jnp.maximum(masked.sum(-1, keepdims=True), 1)).ravel()
    if capacity is None:
        return Chosen(jnp.arange(flat.size), flat, weight)
    (index,) = jnp.nonzero(flat, size=capacity, fill_value=flat.size)
    there = index < flat.size
    index = jnp.where(there, index, 0)
    return Chosen(index, there, jnp.where(there, weight[index], 0.0))


class Network(nn.Module):
    """Crops -> `Outputs`: one backbone pass per resolution, one head pass over all crops.

    Crops are flattened batch-major ([B, C, ...] -> [B * C, ...]), so that a batch sharded over devices stays where it
    is. Batch norm sees each resolution in turn in the backbone (globals first) and all crops at once in the head.
    `patch_head`: reads patches; None: `head` does.
    """

    backbone: nn.Module
    head: nn.Module
    patch_head: nn.Module | None = None

    def __call__(
        self,
        crops: Sequence[Float[Array | np.ndarray, "B _ _ _ c"]],
        drop_path: Float[Array, "depth branches B C"] | None = None,
        train: bool = False,
        masked: Bool[Array | np.ndarray, "B 2 N"] | None = None,
        chosen: Chosen | None = None,
    ) -> Outputs:
        """`crops`: one [B, C_i, h, w, c] per resolution; `drop_path` [depth, 2, B, C] or None, C = sum of C_i.

        `masked`: patches of the global crops that the mask token replaces; None: none. `chosen`: also return the patch
        tokens of the global crops, and the patch head's logits of these.
        """
        features, first, patches = [], 0, None
        for images in crops:
            batch, count = images.shape[:2]
            keep = None
            if drop_path is not None:
                keep = drop_path[..., first : first + count]
                keep = keep.reshape(*keep.shape[:2], batch * count)  # [depth, 2, B, C_i] -> [depth, 2, B*C_i]
            flat = images.reshape(batch * count, *images.shape[2:])
            if first or chosen is None:
                out = self.backbone(flat, keep, train)
            else:
                hidden = None if masked is None else masked.reshape(batch * count, -1)
                tokens = self.backbone.tokens(flat, 1, keep, hidden)
                out, patches = tokens.cls[0], tokens.flat_patches[0]  # [B*2, D], [B*2, N, D]
            features.append(out.reshape(batch, count, -1))  # [B*C_i, D] -> [B, C_i, D]
            first += count
        stacked = jnp.concatenate(features, axis=1)  # [B, C, D]
        logits = self.head(stacked.reshape(-1, stacked.shape[-1]), train)  # [B*C, K]
        outputs = Outputs(stacked, logits.reshape(*stacked.shape[:2], -1))
        if patches is None or chosen is None:
            return outputs
        read = self.head if self.patch_head is None else self.patch_head
        patch_logits = read(patches.reshape(-1, patches.shape[-1])[chosen.place], train)
        return outputs._replace(
            patches=patches.reshape(len(stacked), 2, *patches.shape[1:]), patch_logits=patch_logits, chosen=chosen
        )
