"""Layers and initializers shared by the backbones and the head.

Shape legend of the package: B batch, C crops, N tokens, D width, H heads, K prototypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.errors import UserError
from dino_jax.models.packing import Array, Extent, Images

# The official `trunc_normal_(std=.02)` cuts at +-2, 100 deviations away: in effect a plain normal.
INIT_STD = 0.02
normal_init = nn.initializers.normal(INIT_STD)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an input of `height` x `width` pixels; `UserError` if they do not fit."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"an input of {height} x {width} pixels is not divisible into patches of {patch_size}: "
            "change model.patch_size, crops.global_size or crops.local_size"
        )
    return height // patch_size, width // patch_size


def check_channels(images: Images, in_chans: int) -> None:
    """Raises `UserError` unless `images` [B, h, w, c] have the model's channels."""
    if images.shape[-1] != in_chans:
        raise UserError(f"the images have {images.shape[-1]} channels: set model.in_chans={images.shape[-1]}")


def torch_uniform(fan_in: int) -> Callable[..., Array]:
    """Initializer U(-b, b) with b = 1 / sqrt(fan_in): what torch's `Linear` and `Conv2d` draw by default."""
    bound = 1 / np.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def statistics_dtype(dtype: Any) -> np.dtype:
    """The type in which norms, softmax and logits are computed: at least float32, and float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


def unit(x: Array, axis: int = -1) -> Array:
    """L2-normalizes `x` along `axis`, with a norm of at least 1e-12 as in torch's `normalize`; same shape."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))


@jax.checkpoint
def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Exact (erf) GELU, torch's default, computed in at least float32; same shape and dtype.

    Only `x` is saved for the backward pass: recomputing the rest is cheaper than writing and reading it.
    """
    exact = x.astype(statistics_dtype(x.dtype))
    return (exact * (0.5 + 0.5 * jax.lax.erf(exact * 2**-0.5))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_map(
    x: Float[Array | np.ndarray, "*N D"], kernel: Float[Array | np.ndarray, "D E"], precision: Any = None
) -> Float[Array, "*N E"]:
    """Matrix product of [..., D] and [D, E] -> [..., E] in their dtype; see `_kernel_gradient` for CPUs."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _linear_map_forward(x: Array, kernel: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return linear_map(x, kernel, precision), (x, kernel)


def _linear_map_backward(precision: Any, saved: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    x, kernel = saved
    to_x = jax.lax.dot_general(out, kernel, (((out.ndim - 1,), (1,)), ((), ())), precision=precision)
    return to_x, _kernel_gradient(x, out, precision)


linear_map.defvjp(_linear_map_forward, _linear_map_backward)


def _kernel_gradient(x: Array, out: Array, precision: Any) -> Array:
    """Gradient of the kernel [D, E], from the input [..., D] and the output's gradient [..., E].

    On a TPU it sums over several axes at once: merging them first cost 43% more memory traffic. On a CPU they are
    merged: XLA would transpose the gradient and recompute it through all later blocks, in time quadratic in the depth.
    """

    def over_axes(x: Array, out: Array) -> Array:
        axes = tuple(range(x.ndim - 1))
        return jax.lax.dot_general(out, x, ((axes, axes), ((), ())), precision=precision).T

    def over_rows(x: Array, out: Array) -> Array:
        x, out = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        return jax.lax.dot_general(x, out, (((0,), (0,)), ((), ())), precision=precision)

    return jax.lax.platform_dependent(x, out, cpu=over_rows, default=over_axes)


def _product(x: Array, kernel: Array, dimensions: Any, precision: Any = None) -> Array:
    """`linear_map` with the signature that `nn.Dense` calls."""
    return linear_map(x, kernel, precision)


def dense(features: int, module: nn.Module, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """Linear layer, bias initially 0, with `module`'s dtype, matmul precision and, if it has one, `init_std`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=nn.initializers.normal(getattr(module, "init_std", INIT_STD)),
        dtype=module.dtype,
        precision=module.precision,
        dot_general=_product,
        name=name,
    )


def conv(features: int, size: int, module: nn.Module, stride: int = 1, **options: Any) -> nn.Conv:
    """Convolution padded by size // 2 on every side as in torch, with the dtype and precision of `module`."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        dtype=module.dtype,
        precision=module.precision,
        **options,
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
    init_std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = gelu(dense(self.hidden, self, "fc1")(x))  # [B, N, hidden]
        return dense(x.shape[-1], self, "fc2")(hidden)


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

    `valid` bool [B, N]: tokens that may be attended to; None: all.
    With `class_only` only the first token is a query (class attention of CaiT and XCiT): [B, N, D] -> [B, 1, D].
    `fused`: uses `fused_attention` if all tokens attend to all.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    precision: Any = None
    class_only: bool = False
    init_std: float = INIT_STD
    fused: bool = False

    def setup(self) -> None:
        self.qkv = dense(3 * self.width, self)
        self.proj = dense(self.width, self)

    def __call__(self, x: Array, valid: Array | None = None) -> Array:
        if self.fused and valid is None and not self.class_only:
            out = fused_attention(*self._project(x))
        else:
            weights, value = self._attend(x, valid)
            out = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(self.dtype), value, precision=self.precision)
        return self.proj(out.reshape(x.shape[0], -1, self.width))  # [B, N, H, D/H] -> [B, N, D]

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], x: Array) -> Array:
        """See `packing.Canvas`: tokens attend to CLS and the image's own patches."""
        return call(x, jnp.pad(extent.patches(), ((0, 0), (1, 0)), constant_values=True))

    def weights(self, x: Array) -> Array:
        """Attention weights [B, H, N, N], or [B, H, 1, N] with `class_only`; rows sum to 1."""
        return self._attend(x)[0]

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [B, N, H, D/H]."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)  # [B, N, 3, H, D/H]
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def _attend(self, x: Array, valid: Array | None = None) -> tuple[Array, Array]:
        query, key, value = self._project(x)
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
