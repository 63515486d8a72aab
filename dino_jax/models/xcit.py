"""XCiT: attention between channels instead of tokens (El-Nouby et al., arXiv 2106.09681), as DINO released it.

Computes the same as the official `xcit.py` with convolutional patch embedding; parameter names are torch's with `_` for
`.` inside lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.errors import UserError
from dino_jax.models.attention import Attention
from dino_jax.models.backbone import Backbone, Tokens, split_tokens
from dino_jax.models.layers import (
    Array,
    Mlp,
    add_branch,
    check_channels,
    conv,
    dense,
    gelu,
    layer_norm,
    normal_init,
    patch_grid,
    statistics_dtype,
    torch_uniform,
    unit,
)
from dino_jax.models.norm import BatchNorm
from dino_jax.models.packing import AnySize, Canvas, Extent, Images


def fourier_features(rows: int, columns: int, half: int = 32) -> np.ndarray:
    """Sines and cosines of each patch's row, then of its column, [rows, columns, 2 * half], float64.

    Coordinates run from 2 pi / n to 2 pi over any n patches, so no input size needs resizing.
    """
    wavelength = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def waves(count: int) -> np.ndarray:
        place = 2 * np.pi * np.arange(1, count + 1) / (count + 1e-6)
        angle = place[:, None] / wavelength  # [count, half]
        return np.where(np.arange(half) % 2, np.cos(angle), np.sin(angle))

    down = np.broadcast_to(waves(rows)[:, None], (rows, columns, half))
    across = np.broadcast_to(waves(columns)[None], (rows, columns, half))
    return np.concatenate([down, across], axis=-1)


class PositionEncoding(nn.Module):
    """A learned projection of Fourier features: [1 or B, rows, columns, 64] -> [1 or B, rows * columns, D]."""

    embed_dim: int
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, features: Array) -> Array:
        init = torch_uniform(features.shape[-1])
        positions = conv(self.embed_dim, 1, self, kernel_init=init, bias_init=init, name="token_projection")(features)
        return positions.reshape(features.shape[0], -1, self.embed_dim)

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], features: Array) -> Array:
        """See `packing.Canvas`: uses the features of each image's own grid."""
        return call(extent.features.astype(features.dtype))


class PatchStem(nn.Module):
    """3 x 3 convolutions of stride 2, batch norm after each, GELU between: [B, h, w, c] -> [B, h/p, w/p, D]."""

    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, images: Images, train: bool) -> Array:
        x: Any = images.astype(self.dtype)
        count = {8: 3, 16: 4}[self.patch_size]
        for i in range(count):
            x = gelu(x) if i else x
            features, init = self.embed_dim >> (count - 1 - i), torch_uniform(9 * x.shape[-1])
            name = f"proj_{2 * i}"
            x = conv(features, 3, self, stride=2, use_bias=False, kernel_init=init, name=f"{name}_0")(x)
            x = BatchNorm(self.dtype, name=f"{name}_1")(x, train)
        return x


class ChannelAttention(nn.Module):
    """Cross-covariance attention [B, N, D] -> [B, N, D]: in each head, channels attend to channels (section 3.2).

    `valid` bool [B, N]: False for padding; None: all.
    """

    heads: int
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:
        batch, tokens, width = x.shape
        exact = statistics_dtype(self.dtype)
        qkv = dense(3 * width, self, "qkv")(x)
        if valid is not None:  # the bias made padding nonzero
            qkv = qkv * valid[..., None]
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        # [B, N, H, D/H]: every channel has L2 norm 1 over the tokens
        query, key = (unit(qkv[:, :, i].astype(exact), axis=1).astype(self.dtype) for i in (0, 1))
        temperature = self.param("temperature", nn.initializers.ones, (self.heads, 1, 1))
        product = {"precision": self.precision}
        logits = jnp.einsum("bnhc,bnhd->bhcd", query, key, preferred_element_type=exact, **product)
        weights = jax.nn.softmax(logits * temperature, axis=-1).astype(self.dtype)  # [B, H, D/H, D/H]
        out = jnp.einsum("bhcd,bnhd->bnhc", weights, qkv[:, :, 2], **product)
        return dense(width, self, "proj")(out.reshape(x.shape))

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], x: Array) -> Array:
        """See `packing.Canvas`."""
        return call(x, extent.patches())


class LocalInteraction(nn.Module):
    """Two depthwise 3 x 3 convolutions, GELU and batch norm between: [B, N, D] -> [B, N, D]."""

    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, grid: tuple[int, int], train: bool) -> Array:
        batch, tokens, width = x.shape
        init = torch_uniform(9)
        options: dict[str, Any] = {"feature_group_count": width, "kernel_init": init, "bias_init": init}
        x = x.reshape(batch, *grid, width)  # [B, N, D] -> [B, rows, columns, D]
        x = BatchNorm(self.dtype, name="bn")(gelu(conv(width, 3, self, name="conv1", **options)(x)), train)
        return conv(width, 3, self, name="conv2", **options)(x).reshape(batch, tokens, width)

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], x: Array, *options: Any) -> Array:
        """See `packing.Canvas`."""
        return call(x * extent.patches()[..., None], *options)


class Block(nn.Module):
    """Channel attention, local interaction, MLP [B, N, D] -> [B, N, D]; each branch has a gamma, initially `eta`.

    `keep` [3, B] scales the attention, MLP and local branches (the order of the gammas).
    """

    heads: int
    eta: float
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, grid: tuple[int, int], keep: Array | None, train: bool) -> Array:
        width, numerics = x.shape[-1], {"dtype": self.dtype, "precision": self.precision}
        gamma1, gamma2, gamma3 = (
            self.param(f"gamma{i}", nn.initializers.constant(self.eta), (width,)).astype(self.dtype) for i in (1, 2, 3)
        )
        keep1, keep2, keep3 = (None, None, None) if keep is None else keep
        branch = ChannelAttention(self.heads, **numerics, name="attn")(layer_norm(self, "norm1")(x))
        x = add_branch(x, gamma1 * branch, keep1)
        branch = LocalInteraction(**numerics, name="local_mp")(layer_norm(self, "norm3")(x), grid, train)
        x = add_branch(x, gamma3 * branch, keep3)
        branch = Mlp(4 * width, **numerics, name="mlp")(layer_norm(self, "norm2")(x))
        return add_branch(x, gamma2 * branch, keep2)


class ClassBlock(nn.Module):
    """Class attention [B, 1 + N, D] -> [B, 1 + N, D]: only CLS attends, to all tokens (CaiT, arXiv 2103.17239).

    Patch tokens pass through both norms too, as in the released models (`tokens_norm=True`).
    """

    heads: int
    width: int
    eta: float
    dtype: Any = jnp.float32
    precision: Any = None

    def setup(self) -> None:
        self.norm1 = layer_norm(self)
        self.attn = Attention(self.heads, self.width, self.dtype, self.precision, class_only=True)
        self.norm2 = layer_norm(self)
        self.mlp = Mlp(4 * self.width, self.dtype, self.precision)
        init = nn.initializers.constant(self.eta)
        self.gamma1 = self.param("gamma1", init, (self.width,))
        self.gamma2 = self.param("gamma2", init, (self.width,))

    def __call__(self, x: Array) -> Array:
        normed = self.norm1(x)
        gathered = jnp.concatenate([self.attn(normed), normed[:, 1:]], axis=1)
        x = self.norm2(x + self.gamma1.astype(self.dtype) * gathered)
        cls = self.gamma2.astype(self.dtype) * self.mlp(x[:, :1])
        return x + jnp.concatenate([cls, x[:, 1:]], axis=1)

    def attention(self, x: Array) -> Array:
        """The attention of CLS to all tokens, [B, H, 1, 1 + N]."""
        return self.attn.weights(self.norm1(x))


class XCiT(Backbone):
    """Cross-covariance image transformer: `depth` blocks on the patches, then two of class attention.

    Patches are 8 or 16 pixels wide; any input size that they divide works. `eta` is the initial LayerScale.
    """

    embed_dim: int
    depth: int
    heads: int
    eta: float
    patch_size: int = 16
    in_chans: int = 3
    dtype: Any = jnp.float32
    precision: Any = None
    remat: bool = False

    class_depth = 2
    linear_features = ("1", "1+avg")

    def setup(self) -> None:
        if self.patch_size not in (8, 16):
            raise UserError(f"model.patch_size={self.patch_size}: an XCiT has patches of 8 or 16")
        numerics = (self.dtype, self.precision)
        self.patch_embed = PatchStem(self.embed_dim, self.patch_size, *numerics)
        self.pos_embeder = PositionEncoding(self.embed_dim, *numerics)
        block = nn.remat(Block, static_argnums=(2, 4)) if self.remat else Block
        self.blocks = [block(self.heads, self.eta, *numerics) for _ in range(self.depth)]
        self.cls_token = self.param("cls_token", normal_init, (1, 1, self.embed_dim))
        self.cls_attn_blocks = [
            ClassBlock(self.heads, self.embed_dim, self.eta, *numerics) for _ in range(self.class_depth)
        ]
        self.norm = layer_norm(self)

    def __call__(
        self,
        images: Images,
        drop_path: Float[Array, "depth 3 B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B D"]:
        """CLS after the final norm, [B, D], for normalized `images` [B, h, w, c].

        `drop_path` [depth, 3, B]: factors (0 or 1 / keep probability) of the attention, MLP and local branches of the
        patches' blocks; None: off. In training batch norm uses the batch's statistics.
        """
        x = self._patches(images, drop_path, train)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x[:, 0])

    @nn.nowrap
    def drop_rates(self, rate: float) -> np.ndarray:
        """Stochastic depth rates [depth, 3] of the attention, MLP and local branches: `rate` in every block."""
        return np.full((self.depth, 3), rate)

    def tokens(self, images: Images, n: int = 1) -> Tokens:
        """Tokens of the last `n` class attention blocks after the final norm, leading axes [n, B]."""
        if not 1 <= n <= self.class_depth:
            raise UserError(f"tokens of the last {n} blocks: an XCiT has CLS in its last {self.class_depth} only")
        x, kept = self._patches(images), []
        for block in self.cls_attn_blocks:
            x = block(x)
            kept.append(self.norm(x))
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        return split_tokens(jnp.stack(kept[-n:]), self.registers, grid)

    def attention(self, images: Images, block: int = -1) -> Array:
        """Attention of CLS to all tokens, [B, H, 1, 1 + N], in one of the class attention blocks; rows sum to 1."""
        if not -self.class_depth <= block < self.class_depth:
            raise UserError(f"attention of block {block}: an XCiT has {self.class_depth} class attention blocks")
        x = self._patches(images)
        for earlier in self.cls_attn_blocks[: block % self.class_depth]:
            x = earlier(x)
        return self.cls_attn_blocks[block].attention(x)

    @nn.nowrap
    def any_size(self, variables: Any) -> AnySize:
        """Canvases, with the position features of each image's own grid."""
        return Canvas(self, fourier_features)

    def _patches(self, images: Images, drop_path: Array | None = None, train: bool = False) -> Array:
        """CLS, then the patch tokens after all channel attention: [B, h, w, c] -> [B, 1 + N, D]."""
        check_channels(images, self.in_chans)
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        x = self.patch_embed(images, train).reshape(images.shape[0], -1, self.embed_dim)
        x = x + self.pos_embeder(jnp.asarray(fourier_features(*grid)[None], self.dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, grid, None if drop_path is None else drop_path[i], train)
        cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (x.shape[0], 1, self.embed_dim))
        return jnp.concatenate([cls, x], axis=1)
