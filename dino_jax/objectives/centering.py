"""What keeps a teacher's outputs from collapsing: a moving center, or Sinkhorn-Knopp.

Legend: M samples (on this device), K prototypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from dino_jax.parallel import sharding

ROUNDS = 3  # of Sinkhorn-Knopp in SwAV, DINOv2 and DINOv3


def centered(
    logits: Float[Array | np.ndarray, "*M K"], center: Float[Array | np.ndarray, " K"], temp: Any
) -> Float[Array, "*M K"]:
    """log softmax((logits - center) / temp) in at least float32, without a gradient (DINO, eq. 1 and 4)."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits, center = jax.lax.stop_gradient((logits.astype(dtype), center.astype(dtype)))
    return jax.nn.log_softmax((logits - center) / temp, axis=-1)


def moved(
    center: Float[Array | np.ndarray, " K"], mean: Float[Array | np.ndarray, " K"], momentum: float
) -> Float[Array | np.ndarray, " K"]:
    """The center after a step whose logits had this mean (DINO, eq. 4)."""
    return center * momentum + mean * (1 - momentum)


def sinkhorn_knopp(
    logits: Float[Array | np.ndarray, "M K"],
    temp: Any,
    valid: Bool[Array | np.ndarray, " M"] | None = None,
    rounds: int = ROUNDS,
) -> Float[Array, "M K"]:
    """Log probabilities of exp(logits / temp) after Sinkhorn-Knopp over all devices' samples, without a gradient.

    Each round gives every prototype the same total over the samples, then every sample a sum of 1 (Caron et al. 2020,
    arXiv 2006.09882). Samples that are not `valid` do not count. Under `shard_map` over rows, sums run over all
    devices; with gradient accumulation, over one microbatch. Computes with logarithms, in at least float32, so that
    large logits do not overflow. Official: `sinkhorn_knopp_teacher` of DINOv2.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    scores = jax.lax.stop_gradient(jnp.asarray(logits, dtype)) / temp
    for _ in range(rounds):
        scores -= _log_total(scores if valid is None else jnp.where(valid[:, None], scores, -jnp.inf))
        scores -= jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return scores


def _log_total(scores: Float[Array, "M K"]) -> Float[Array, "1 K"]:
    """The logarithm of each prototype's sum of exp(scores) over the samples of all devices."""
    axes = sharding.row_axes()
    largest = scores.max(axis=0, keepdims=True)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    total = jnp.exp(scores - largest).sum(axis=0, keepdims=True)
    return jnp.log(jax.lax.psum(total, axes) if axes else total) + largest


@dataclasses.dataclass(frozen=True)
class Centering:
    """The part of a term that keeps its teacher's K outputs from collapsing, as its `centering` key says.

    With `ema` its state is a center [K]; with `sinkhorn` it has none. `dtype`: the compute type.
    """

    settings: ConfigDict  # the term's group, with `centering` and `center_momentum`
    K: int
    dtype: Any

    @property
    def moving(self) -> bool:
        """Whether there is a center."""
        return self.settings.centering == "ema"

    @property
    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """See `Objective`."""
        return {"center": ("prototypes",)} if self.moving else {}

    def init(self) -> dict[str, Array]:
        """The state at step 0."""
        return {"center": jnp.zeros(self.K, jnp.promote_types(self.dtype, jnp.float32))} if self.moving else {}

    def log_targets(self, state: Mapping[str, Array], logits: Array, temp: Any, valid: Array | None = None) -> Array:
        """Log probabilities of logits [..., K], without a gradient; `valid`: see `sinkhorn_knopp`."""
        if self.moving:
            return centered(logits, state["center"], temp)
        return sinkhorn_knopp(logits.reshape(-1, self.K), temp, valid).reshape(logits.shape)

    def update(self, state: Mapping[str, Array], mean: Any) -> dict[str, Any]:
        """The state after a step whose logits had this mean [K]."""
        return {"center": moved(state["center"], mean, self.settings.center_momentum)} if self.moving else {}
