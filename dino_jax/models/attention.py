"""Multi-head self-attention, in plain JAX or by cuDNN.

Shape legend of the package: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dino_jax.models.layers import INIT_STD, Array, dense, statistics_dtype
from dino_jax.models.packing import Extent
from dino_jax.models.positions import Rope, rotate


def can_fuse_attention(dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's fused attention runs here: an Ampere GPU or newer, bfloat16, heads of a supported width."""
    device = jax.devices()[0]
    if device.platform != "gpu" or dtype != jnp.bfloat16 or head_width % 8 or head_width > 128:
        return False
    return float(getattr(device, "compute_capability", 0)) >= 8.0


def fused_attention(
    query: Float[Array, "B N H d"], key: Float[Array, "B N H d"], value: Float[Array, "B N H d"]
) -> Float[Array, "B N H d"]:
    """cuDNN attention on [B, N, H, D/H], without an [N, N] array; bfloat16, softmax in float32.

    On a mesh each device works on its own rows: XLA cannot partition a cuDNN kernel.
    """
    batch, tokens = query.shape[:2]
    odd = tokens % 2  # JAX needs an even number in training: pad with one that is never attended to

    def attend(query: Array, key: Array, value: Array) -> Array:
        padded = [jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (query, key, value)]
        there = jnp.full((batch,), tokens, jnp.int32) if odd else None
        out = jax.nn.dot_product_attention(
            *padded, query_seq_lengths=there, key_value_seq_lengths=there, implementation="cudnn"
        )
        return out[:, :tokens]

    mesh, all_of_it = jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec()
    if mesh.size > 1 and (rest := set(mesh.axis_names) - set(mesh.manual_axes)):
        attend = jax.shard_map(attend, in_specs=all_of_it, out_specs=all_of_it, axis_names=rest, check_vma=False)
    return attend(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D]; softmax in at least float32.

    `valid` bool [B, N]: tokens that may be attended to; None: all. `rope`: rotates queries and keys.
    With `class_only` only the first token is a query (class attention of CaiT and XCiT): [B, N, D] -> [B, 1, D].
    `fused`: uses `fused_attention` if all tokens attend to all. `bias`: which of queries, keys and values have one,
    `qkv`, `qv` (as DINOv3 was trained) or `none`.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    precision: Any = None
    class_only: bool = False
    init_std: float = INIT_STD
    fused: bool = False
    bias: str = "qkv"

    def setup(self) -> None:
        self.qkv = dense(3 * self.width, self, use_bias=self.bias == "qkv")
        if self.bias == "qv":
            self.q_bias, self.v_bias = (
                self.param(name, nn.initializers.zeros, (self.width,)) for name in ("q_bias", "v_bias")
            )
        self.proj = dense(self.width, self)

    def __call__(self, x: Array, valid: Array | None = None, rope: Rope | None = None) -> Array:
        if self.fused and valid is None and not self.class_only:
            out = fused_attention(*self._project(x, rope))
        else:
            weights, value = self._attend(x, valid, rope)
            out = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(self.dtype), value, precision=self.precision)
        return self.proj(out.reshape(x.shape[0], -1, self.width))  # [B, N, H, D/H] -> [B, N, D]

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], x: Array) -> Array:
        """See `packing.Canvas`: tokens attend to CLS and the image's own patches."""
        return call(x, jnp.pad(extent.patches(), ((0, 0), (1, 0)), constant_values=True))

    def weights(self, x: Array, rope: Rope | None = None) -> Array:
        """Attention weights [B, H, N, N], or [B, H, 1, N] with `class_only`; rows sum to 1."""
        return self._attend(x, rope=rope)[0]

    def _project(self, x: Array, rope: Rope | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [B, N, H, D/H]."""
        qkv = self.qkv(x)
        if self.bias == "qv":
            bias = jnp.concatenate([self.q_bias, jnp.zeros_like(self.q_bias), self.v_bias])
            qkv += bias.astype(qkv.dtype)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)  # [B, N, 3, H, D/H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return (query, key, value) if rope is None else (rotate(query, rope), rotate(key, rope), value)

    def _attend(self, x: Array, valid: Array | None = None, rope: Rope | None = None) -> tuple[Array, Array]:
        query, key, value = self._project(x, rope)
        if self.class_only:
            query = query[:, :1]
        logits = jnp.einsum(
            "bnhd,bmhd->bhnm",
            query,
            key,
            precision=self.precision,
            preferred_element_type=statistics_dtype(self.dtype),
        )
        if valid is not None:
            logits = jnp.where(valid[:, None, None, :], logits, -jnp.inf)
        return jax.nn.softmax(logits * (self.width // self.heads) ** -0.5, axis=-1), value
