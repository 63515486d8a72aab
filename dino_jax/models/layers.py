"""Layers and initialisers that several backbones and the head share.

Shape legend of the package: B batch, C crops, N tokens, D width, H heads, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# The official `trunc_normal_(std=.02)` cuts at +-2 absolute, a hundred deviations away: a plain normal.
normal_init = nn.initializers.normal(0.02)


def torch_uniform(fan_in: int) -> Callable[..., Array]:
    """Initialiser U(-b, b) with b = 1 / sqrt(fan_in): what torch's `Linear` and `Conv2d` draw by default."""
    bound = 1 / np.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def statistics_dtype(dtype: Any) -> np.dtype:
    """The type in which norms, softmax and logits are computed: at least float32, and float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


def gelu(x: Array) -> Array:
    """GELU with the exact error function, torch's default; same shape and dtype."""
    return jax.nn.gelu(x, approximate=False)


def dense(features: int, module: nn.Module, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """Linear layer N(0, .02), bias 0, with the dtype and matmul precision of `module`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=normal_init,
        dtype=module.dtype,
        precision=module.precision,
        name=name,
    )


def layer_norm(module: nn.Module, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the official eps 1e-6, statistics in at least float32, output in the dtype of `module`."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=module.dtype, name=name)


def add_branch(x: Array, branch: Array, keep: Array | None) -> Array:
    """Residual sum [B, N, D] with stochastic depth: `keep` [B] is 0 or 1/(keep probability) per sample; None: 1."""
    if keep is None:
        return x + branch
    return x + branch * keep.astype(branch.dtype)[:, None, None]


class Mlp(nn.Module):
    """Linear to `hidden`, exact GELU, linear back: [B, N, D] -> [B, N, D]."""

    hidden: int
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = gelu(dense(self.hidden, self, "fc1")(x))  # [B, N, hidden]
        return dense(x.shape[-1], self, "fc2")(hidden)
