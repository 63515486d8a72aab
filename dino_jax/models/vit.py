"""Vision transformer as in DINO: images [B, h, w, c] -> tokens [B, N, D] -> CLS feature [B, D].

Computes the same as the official `vision_transformer.py` (pre-norm, qkv bias, exact GELU, LayerNorm eps 1e-6, position
table resized to the input's grid); parameter names are torch's with `_` for `.` inside lists.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.errors import UserError
from dino_jax.models.backbone import Backbone, Tokens, split_tokens
from dino_jax.models.layers import (
    INIT_STD,
    Array,
    Attention,
    Mlp,
    add_branch,
    layer_norm,
    linear_map,
    normal_init,
    patch_grid,
    statistics_dtype,
    torch_uniform,
)
from dino_jax.models.packing import AnySize, Images, Line
from dino_jax.models.resample import CUBIC, resample_matrix


def resize_matrix(source: int, target: int) -> np.ndarray:
    """Resize weights [target, source], float64: half-pixel centers, no antialias, scale (target + 0.1) / source."""
    return resample_matrix((np.arange(target) + 0.5) * source / (target + 0.1) - 0.5, source, CUBIC)


def resize_pos_embed(
    pos_embed: Float[Array | np.ndarray, "1 source D"],
    grid: tuple[int, int],
    table_grid: tuple[int, int] | None = None,
) -> Float[Array | np.ndarray, "1 target D"]:
    """Resizes the position table [1, 1 + N, D] to `grid` (rows, columns): [1, 1 + rows * columns, D], CLS first.

    As in the official `interpolate_pos_encoding` for images of whole patches: bicubic, scale (n + 0.1) / source,
    unchanged only if the grid is the table's own. (For images that are not square, the official code also resizes a
    table that fits; so does `ViT.any_size`.) `table_grid` is the table's (rows, columns); None: square. Computes in at
    least float32.
    """
    count = pos_embed.shape[1] - 1
    if table_grid is None:
        table_grid = (round(count**0.5), round(count**0.5))
    if table_grid[0] * table_grid[1] != count:
        raise UserError(f"a position table of {count} patches is not a grid of {table_grid[0]} x {table_grid[1]}")
    if tuple(grid) == tuple(table_grid):
        return pos_embed
    dtype = statistics_dtype(pos_embed.dtype)
    rows, columns = (jnp.asarray(resize_matrix(s, t), dtype) for s, t in zip(table_grid, grid, strict=True))
    cls, patches = pos_embed[:, :1].astype(dtype), pos_embed[:, 1:].astype(dtype)
    patches = patches.reshape(1, *table_grid, -1)  # [1, N, D] -> [1, rows, columns, D]
    patches = jnp.einsum("ir,jc,brcd->bijd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([cls, patches.reshape(1, -1, patches.shape[-1])], axis=1)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel size, as one matrix product: [B, h, w, c] -> [B, N, D]."""

    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, images: Images) -> Array:
        batch, height, width, channels = images.shape
        p = self.patch_size
        rows, columns = patch_grid(height, width, p)
        init = torch_uniform(p * p * channels)
        kernel = self.param("kernel", init, (p, p, channels, self.embed_dim))
        bias = self.param("bias", init, (self.embed_dim,))
        x = images.astype(self.dtype).reshape(batch, rows, p, columns, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * channels)  # [B, N, p*p*c]
        kernel = kernel.astype(self.dtype).reshape(-1, self.embed_dim)
        return linear_map(x, kernel, self.precision) + bias.astype(self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block [B, N, D] -> [B, N, D]; `keep` [2, B] scales its two residual branches.

    `valid` bool [B, N]: tokens that may be attended to; None: all.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    precision: Any = None
    init_std: float = INIT_STD
    fused: bool = False

    def setup(self) -> None:
        self.norm1 = layer_norm(self)
        numerics = self.dtype, self.precision
        self.attn = Attention(self.heads, self.width, *numerics, init_std=self.init_std, fused=self.fused)
        self.norm2 = layer_norm(self)
        self.mlp = Mlp(4 * self.width, self.dtype, self.precision, self.init_std)

    def __call__(self, x: Array, keep: Array | None = None, valid: Array | None = None) -> Array:
        x = add_branch(x, self.attn(self.norm1(x), valid), None if keep is None else keep[0])
        return add_branch(x, self.mlp(self.norm2(x)), None if keep is None else keep[1])

    def attention(self, x: Array) -> Array:
        """This block's attention on `x`, [B, H, N, N]."""
        return self.attn.weights(self.norm1(x))


class ViT(Backbone):
    """Vision transformer; see `dino_jax.models.BACKBONES` for the sizes.

    `image_size` (height, width) fixes the size of the position table; any input size that the patch divides works.
    `dtype` is the compute type, parameters are float32. `remat` recomputes each block in the backward pass.
    `fused`: attention by cuDNN (`layers.fused_attention`). `init_std`: initial standard deviation of the blocks' linear
    layers; the official 0.02 suits a width of a few hundred. `registers`: number of learned tokens between CLS and the
    patches, without a position and not part of the features (Darcet et al., arXiv 2309.16588), ordered as in DINOv2.
    """

    embed_dim: int
    depth: int
    heads: int
    patch_size: int = 16
    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    dtype: Any = jnp.float32
    precision: Any = None
    remat: bool = False
    init_std: float = INIT_STD
    fused: bool = False
    registers: int = 0

    def setup(self) -> None:
        rows, columns = patch_grid(*self.image_size, self.patch_size)
        self.patch_embed = PatchEmbed(self.embed_dim, self.patch_size, self.dtype, self.precision)
        self.cls_token = self.param("cls_token", normal_init, (1, 1, self.embed_dim))
        self.pos_embed = self.param("pos_embed", normal_init, (1, 1 + rows * columns, self.embed_dim))
        if self.registers:  # last, so that the others are initialized as without them
            self.register_tokens = self.param("register_tokens", normal_init, (1, self.registers, self.embed_dim))
        block = nn.remat(Block) if self.remat else Block
        numerics = self.dtype, self.precision, self.init_std, self.fused
        self.blocks = [block(self.heads, self.embed_dim, *numerics) for _ in range(self.depth)]
        self.norm = layer_norm(self)

    def __call__(
        self,
        images: Images,
        drop_path: Float[Array, "depth 2 B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B D"]:
        """CLS after the final norm, [B, D], for normalized `images` [B, h, w, c].

        `drop_path` [depth, 2, B]: factors (0 or 1 / keep probability) of the attention and MLP branches; None: off.
        `train` is ignored: only backbones with batch norm need it.
        """
        x = self._embed(images)
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[i])
        return self.norm(x[:, 0])

    def tokens(self, images: Images, n: int = 1) -> Tokens:
        """Tokens of the last `n` blocks after the final norm, leading axes [n, B]."""
        if not 1 <= n <= self.depth:
            raise UserError(f"tokens of the last {n} blocks: this model has {self.depth}")
        x, kept = self._embed(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= self.depth - n:
                kept.append(self.norm(x))
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        return split_tokens(jnp.stack(kept), self.registers, grid)

    def attention(self, images: Images, block: int = -1) -> Array:
        """Attention [B, H, N, N] of one block (negative: from the end), N = 1 + R + patches; rows sum to 1."""
        if not -self.depth <= block < self.depth:
            raise UserError(f"attention of block {block}: this model has blocks 0 to {self.depth - 1}")
        x = self._embed(images)
        for earlier in self.blocks[: block % self.depth]:
            x = earlier(x)
        return self.blocks[block].attention(x)

    def line(self, strips: Array, positions: Array, valid: Array, patches: bool) -> tuple[Array, Array | None]:
        """CLS [B, D] and, with `patches`, the patch tokens [B, N, D], for images packed by `packing.Line`."""
        first = jnp.broadcast_to(self.pos_embed[:, :1], positions[:, :1].shape)  # the position of CLS
        x = self._sequence(self.patch_embed(strips), jnp.concatenate([first, positions], axis=1))
        valid = jnp.pad(valid, ((0, 0), (1 + self.registers, 0)), constant_values=True)
        for block in self.blocks:
            x = block(x, valid=valid)
        if not patches:
            return self.norm(x[:, 0]), None
        tokens = split_tokens(self.norm(x), self.registers, (1, strips.shape[2] // self.patch_size))
        return tokens.cls, tokens.flat_patches

    @property
    def linear_features(self) -> tuple[str, ...]:  # type: ignore[override]
        """CLS of the last four blocks (paper, ViT-S), and of the last with the mean patch (ViT-B)."""
        return str(min(4, self.depth)), "1+avg"

    @nn.nowrap
    def drop_rates(self, rate: float) -> np.ndarray:
        """Stochastic depth rates [depth, 2] of the attention and MLP branches: linear from 0 to `rate`."""
        return np.linspace(0, rate, self.depth)[:, None].repeat(2, axis=1)

    @nn.nowrap
    def flops(self, height: int, width: int) -> tuple[float, float]:
        """Forward FLOPs on one image, matrix products only: in the patch embedding, and in the blocks."""
        rows, columns = patch_grid(height, width, self.patch_size)
        patches = 2 * rows * columns * self.patch_size**2 * self.in_chans * self.embed_dim
        tokens = 1 + self.registers + rows * columns
        linear = 2 * 12 * self.embed_dim**2 * tokens  # qkv 3, projection 1, MLP 4 + 4
        attention = 2 * 2 * self.embed_dim * tokens**2  # query by key, weights by value
        return patches, self.depth * (linear + attention)

    @nn.nowrap
    def any_size(self, variables: Any) -> AnySize:
        """Lines of patches; a patch's position is its row [D] of the resized table.

        As in the official `interpolate_pos_encoding`, the table is used unchanged only if its grid fits *and* the image
        is square in pixels; for a table of any shape: if as much was cut off at the right as at the bottom.
        """
        own = patch_grid(*self.image_size, self.patch_size)
        table = np.asarray(variables["params"]["pos_embed"], np.float64)[0, 1:]

        def positions(rows: int, columns: int, even: bool) -> np.ndarray:
            if (rows, columns) == own and even:
                return table.astype(np.float32)
            down, across = resize_matrix(own[0], rows), resize_matrix(own[1], columns)
            resized = np.einsum("ir,jc,rcd->ijd", down, across, table.reshape(*own, -1), optimize=True)
            return resized.reshape(rows * columns, -1).astype(np.float32)

        return Line(self, positions, own[0] * own[1])

    def _embed(self, images: Images) -> Array:
        """The first block's input: [B, h, w, c] -> [B, 1 + R + patches, D]."""
        if images.shape[-1] != self.in_chans:
            raise UserError(
                f"the images have {images.shape[-1]} channels, the model takes {self.in_chans}: change model.in_chans"
            )
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        positions = resize_pos_embed(self.pos_embed, grid, patch_grid(*self.image_size, self.patch_size))
        return self._sequence(self.patch_embed(images), jnp.asarray(positions))

    def _sequence(self, patches: Array, positions: Array) -> Array:
        """CLS, registers and patches [B, N, D], with `positions` [1 or B, 1 + N, D] added to all except registers."""
        batch, dtype = patches.shape[0], patches.dtype
        cls = jnp.broadcast_to(self.cls_token.astype(dtype), (batch, 1, self.embed_dim))
        x = jnp.concatenate([cls, patches], axis=1) + positions.astype(dtype)
        if not self.registers:
            return x
        registers = jnp.broadcast_to(self.register_tokens.astype(dtype), (batch, self.registers, self.embed_dim))
        return jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
