"""Batch normalization as torch computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dino_jax.errors import UserError
from dino_jax.models.layers import Array, statistics_dtype
from dino_jax.models.packing import Extent


class BatchNorm(nn.Module):
    """Normalizes each channel (last axis) over all others; statistics in at least float32, output in `dtype`.

    In training the batch's own statistics are used (those of the global batch, however it is sharded: under `shard_map`
    the axes in manual mode are taken to hold other rows of it), and
    `batch_stats` `mean` and `var` [D] move by `momentum` toward them, the variance unbiased (n / (n - 1)): torch's
    convention, not Flax's. They move only where the collection is mutable.
    """

    dtype: Any = jnp.float32
    momentum: float = 0.1
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"], train: bool = False) -> Float[Array, "*N D"]:
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        x = x.astype(statistics_dtype(self.dtype))
        if train:
            mesh = jax.sharding.get_abstract_mesh()
            count = x.size // x.shape[-1] * math.prod(mesh.shape[axis] for axis in mesh.manual_axes)
            if count < 2:
                raise UserError("batch norm needs more than one value per channel in training: raise batch_size")
            mean = _mean(x, mesh.manual_axes)
            var = _mean(jnp.square(x - mean), mesh.manual_axes)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (var * (count / (count - 1)) - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale / jnp.sqrt(var + self.eps)
        return ((x - mean) * factor + bias).astype(self.dtype)

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], *inputs: Any) -> Array:
        """See `packing.Canvas`: the convolution that follows needs a clean border."""
        return extent.clean(call(*inputs))


def _mean(x: Array, mesh_axes: tuple[str, ...]) -> Array:
    """Over all axes but the last, and over mesh axes: [..., D] -> [D]."""
    mean = x.mean(tuple(range(x.ndim - 1)))
    return jax.lax.pmean(mean, mesh_axes) if mesh_axes else mean
