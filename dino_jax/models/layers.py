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
from dino_jax.models.packing import Array, Images

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
    """LayerNorm with eps `module.norm_eps`, else 1e-6; statistics in at least float32, output in the module's dtype."""
    return nn.LayerNorm(
        epsilon=getattr(module, "norm_eps", 1e-6), use_fast_variance=False, dtype=module.dtype, name=name
    )


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


class SwiGlu(nn.Module):
    """Gated linear unit, silu(gate) * value, then a linear layer: [B, N, D] -> [B, N, D] (Shazeer 2020).

    `w12` gives the gate, then the value, each `hidden` wide. Official: `SwiGLUFFN` of DINOv2.
    """

    hidden: int
    dtype: Any = jnp.float32
    precision: Any = None
    init_std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, value = jnp.split(dense(2 * self.hidden, self, "w12")(x), 2, axis=-1)
        return dense(x.shape[-1], self, "w3")(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain [D] on a residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(x.dtype)
