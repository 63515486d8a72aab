"""The projection head: features [B, D] -> logits over the prototypes [B, K]."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from dino_jax.models.layers import Array, dense, gelu, statistics_dtype, torch_uniform, unit
from dino_jax.models.norm import BatchNorm


class PrototypeLayer(nn.Module):
    """Linear layer without bias whose rows are `v` / |v|, times a gain `g` that exists only if it is trained.

    Parameters as torch's `weight_norm` has them: `v` [K, bottleneck], `g` [K, 1] (starts at 1).
    """

    out_dim: int
    train_gain: bool
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        width, exact = x.shape[-1], statistics_dtype(self.dtype)
        v = self.param("v", torch_uniform(width), (self.out_dim, width)).astype(exact)
        weight = v / jnp.linalg.norm(v, axis=1, keepdims=True)
        if self.train_gain:
            weight = weight * self.param("g", nn.initializers.ones, (self.out_dim, 1)).astype(exact)
        return jnp.einsum(
            "bd,kd->bk",
            x.astype(self.dtype),
            weight.astype(self.dtype),
            precision=self.precision,
            preferred_element_type=exact,
        )


class Head(nn.Module):
    """MLP (D -> hidden -> ... -> bottleneck, GELU), L2 norm, weight-normed prototypes (official `DINOHead`).

    Logits are at least float32. With `use_bn`, batch norm stands between each hidden linear layer and its GELU. The
    MLP's parts are named after their places in torch's `nn.Sequential`: mlp_0, mlp_2, mlp_4, or with batch norm
    mlp_0, mlp_1, mlp_3, mlp_4, mlp_6.
    """

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], train: bool = False) -> Float[Array, "B K"]:
        index = 0
        for _ in range(self.layers - 1):
            x = dense(self.hidden_dim, self, f"mlp_{index}")(x)
            if self.use_bn:
                index += 1
                x = BatchNorm(self.dtype, name=f"mlp_{index}")(x, train)
            x = gelu(x)
            index += 2
        x = dense(self.bottleneck_dim, self, f"mlp_{index}")(x)
        x = unit(x.astype(statistics_dtype(self.dtype)))
        return PrototypeLayer(self.out_dim, not self.norm_last_layer, self.dtype, self.precision, name="last_layer")(x)
