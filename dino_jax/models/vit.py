"""The vision transformer of DINO, iBOT, DINOv2 and DINOv3: images [B, h, w, c] -> tokens [B, N, D] -> CLS [B, D].

One module with options. By default it computes the same as DINO's official `vision_transformer.py` (pre-norm, qkv
bias, exact GELU, LayerNorm eps 1e-6, position table resized to the input's grid); with LayerScale, SwiGLU, registers
and a mask token the same as DINOv2's; with rotary positions the same as DINOv3 in transformers and timm. Parameter
names are torch's with `_` for `.` inside lists.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dino_jax.errors import UserError
from dino_jax.models.attention import Attention
from dino_jax.models.backbone import Backbone, Tokens, split_tokens
from dino_jax.models.layers import (
    INIT_STD,
    Array,
    LayerScale,
    Mlp,
    SwiGlu,
    add_branch,
    check_channels,
    layer_norm,
    linear_map,
    normal_init,
    patch_grid,
    statistics_dtype,
    torch_uniform,
)
from dino_jax.models.packing import AnySize, Images, Line
from dino_jax.models.positions import ROPE, TABLES, Rope, resize_pos_embed, rope_of, rope_table

Masked = Bool[Array | np.ndarray, "B N"]  # patches that the mask token replaces


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

    `valid` bool [B, N]: tokens that may be attended to; None: all. `rope`: rotations of queries and keys. Fields: see
    `ViT`.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    precision: Any = None
    init_std: float = INIT_STD
    fused: bool = False
    ffn: str = "mlp"
    ffn_dim: int = 0
    layer_scale: float = 0.0
    norm_eps: float = 1e-6
    qkv_bias: str = "qkv"

    def setup(self) -> None:
        self.norm1 = layer_norm(self)
        numerics = self.dtype, self.precision
        self.attn = Attention(
            self.heads, self.width, *numerics, init_std=self.init_std, fused=self.fused, bias=self.qkv_bias
        )
        self.norm2 = layer_norm(self)
        ffn = {"mlp": Mlp, "swiglu": SwiGlu}[self.ffn]
        self.mlp = ffn(self.ffn_dim, *numerics, self.init_std)
        if self.layer_scale:
            self.ls1, self.ls2 = LayerScale(self.layer_scale), LayerScale(self.layer_scale)

    def __call__(
        self, x: Array, keep: Array | None = None, valid: Array | None = None, rope: Rope | None = None
    ) -> Array:
        branch = self.attn(self.norm1(x), valid, rope)
        x = add_branch(x, self.ls1(branch) if self.layer_scale else branch, None if keep is None else keep[0])
        branch = self.mlp(self.norm2(x))
        return add_branch(x, self.ls2(branch) if self.layer_scale else branch, None if keep is None else keep[1])

    def attention(self, x: Array, rope: Rope | None = None) -> Array:
        """This block's attention on `x`, [B, H, N, N]."""
        return self.attn.weights(self.norm1(x), rope)


def ffn_width(kind: str, width: int) -> int:
    """The usual hidden width of a block's MLP for tokens of `width`: 4 D; SwiGLU: 8 D / 3, rounded up to 8.

    So both have as many parameters. Official: `SwiGLUFFNFused` of DINOv2.
    """
    return 4 * width if kind == "mlp" else (int(4 * width * 2 / 3) + 7) // 8 * 8


class ViT(Backbone):
    """Vision transformer; see `dino_jax.models.BACKBONES` for the sizes.

    Attributes:
      image_size: (height, width) that fixes the size of the position table; any size that the patch divides works.
      dtype: the compute type; parameters are float32.
      remat: recompute each block in the backward pass.
      init_std: initial deviation of the blocks' linear layers; the official 0.02 suits a width of a few hundred.
      fused: attention by cuDNN (`attention.fused_attention`).
      registers: learned tokens between CLS and the patches, without a position and not part of the features (Darcet et
        al., arXiv 2309.16588), ordered as in DINOv2.
      ffn, ffn_dim: the blocks' MLP, `mlp` or `swiglu`, and its hidden width; 0: `ffn_width`.
      layer_scale: initial gain of each residual branch; 0: no gains.
      positions: `offset` or `antialias` (a table, and how it is resized: see `positions`), or `rope`.
      qkv_bias: which of queries, keys and values have a bias: `qkv`, `qv` or `none`.
      norm_eps: added to the variance in every LayerNorm.
      masking: whether there is a token that replaces masked patches.
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
    ffn: str = "mlp"
    ffn_dim: int = 0
    layer_scale: float = 0.0
    positions: str = "offset"
    qkv_bias: str = "qkv"
    norm_eps: float = 1e-6
    masking: bool = False

    def setup(self) -> None:
        rows, columns = patch_grid(*self.image_size, self.patch_size)
        self.patch_embed = PatchEmbed(self.embed_dim, self.patch_size, self.dtype, self.precision)
        self.cls_token = self.param("cls_token", normal_init, (1, 1, self.embed_dim))
        if self.positions != ROPE:
            self.pos_embed = self.param("pos_embed", normal_init, (1, 1 + rows * columns, self.embed_dim))
        if self.registers:  # last, so that the others are initialized as without them
            self.register_tokens = self.param("register_tokens", normal_init, (1, self.registers, self.embed_dim))
        if self.masking:
            self.mask_token = self.param("mask_token", nn.initializers.zeros, (1, self.embed_dim))
        block = nn.remat(Block) if self.remat else Block
        same = ("dtype", "precision", "init_std", "fused", "ffn", "layer_scale", "norm_eps", "qkv_bias")
        options = {name: getattr(self, name) for name in same} | {"ffn_dim": self.hidden}
        self.blocks = [block(self.heads, self.embed_dim, **options) for _ in range(self.depth)]
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
        x, rope = self._embed(images)
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[i], rope=rope)
        return self.norm(x[:, 0])

    def tokens(
        self,
        images: Images,
        n: int = 1,
        drop_path: Float[Array, "depth 2 B"] | None = None,
        masked: Masked | None = None,
    ) -> Tokens:
        """Tokens of the last `n` blocks after the final norm, leading axes [n, B].

        `drop_path`: as for a call. `masked`: patches (row by row) that the mask token replaces; None: none.
        """
        if not 1 <= n <= self.depth:
            raise UserError(f"tokens of the last {n} blocks: this model has {self.depth}")
        (x, rope), kept = self._embed(images, masked), []
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[i], rope=rope)
            if i >= self.depth - n:
                kept.append(self.norm(x))
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        return split_tokens(jnp.stack(kept), self.registers, grid)

    def attention(self, images: Images, block: int = -1) -> Array:
        """Attention [B, H, N, N] of one block (negative: from the end), N = 1 + R + patches; rows sum to 1."""
        if not -self.depth <= block < self.depth:
            raise UserError(f"attention of block {block}: this model has blocks 0 to {self.depth - 1}")
        x, rope = self._embed(images)
        for earlier in self.blocks[: block % self.depth]:
            x = earlier(x, rope=rope)
        return self.blocks[block].attention(x, rope)

    def line(self, strips: Array, positions: Array, valid: Array, patches: bool) -> tuple[Array, Array | None]:
        """CLS [B, D] and, with `patches`, the patch tokens [B, N, D], for images packed by `packing.Line`."""
        x, rope = self.patch_embed(strips), None
        if self.positions == ROPE:
            table = positions.reshape(*positions.shape[:2], 2, -1)
            rope = rope_of(table, 1 + self.registers, statistics_dtype(self.dtype))
            x = self._sequence(x)
        else:
            first = jnp.broadcast_to(self.pos_embed[:, :1], positions[:, :1].shape)  # the position of CLS
            x = self._sequence(x, jnp.concatenate([first, positions], axis=1))
        valid = jnp.pad(valid, ((0, 0), (1 + self.registers, 0)), constant_values=True)
        for block in self.blocks:
            x = block(x, valid=valid, rope=rope)
        if not patches:
            return self.norm(x[:, 0]), None
        tokens = split_tokens(self.norm(x), self.registers, (1, strips.shape[2] // self.patch_size))
        return tokens.cls, tokens.flat_patches

    @property
    def hidden(self) -> int:
        """The hidden width of the blocks' MLP."""
        return self.ffn_dim or ffn_width(self.ffn, self.embed_dim)

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
        ffn = {"mlp": 2, "swiglu": 3}[self.ffn] * self.embed_dim * self.hidden
        linear = 2 * (4 * self.embed_dim**2 + ffn) * tokens  # qkv 3, projection 1
        attention = 2 * 2 * self.embed_dim * tokens**2  # query by key, weights by value
        return patches, self.depth * (linear + attention)

    @nn.nowrap
    def any_size(self, variables: Any) -> AnySize:
        """Lines of patches; a patch's position is its row [D] of the resized table, or its rotation.

        As in the official `interpolate_pos_encoding`, the table is used unchanged only if its grid fits *and* the image
        is square in pixels; for a table of any shape: if as much was cut off at the right as at the bottom.
        """
        own = patch_grid(*self.image_size, self.patch_size)
        if self.positions == ROPE:
            return Line(self, self._rotations, own[0] * own[1])
        table, matrix = np.asarray(variables["params"]["pos_embed"], np.float64)[0, 1:], TABLES[self.positions]

        def positions(rows: int, columns: int, even: bool) -> np.ndarray:
            if (rows, columns) == own and even:
                return table.astype(np.float32)
            down, across = matrix(own[0], rows), matrix(own[1], columns)
            resized = np.einsum("ir,jc,rcd->ijd", down, across, table.reshape(*own, -1), optimize=True)
            return resized.reshape(rows * columns, -1).astype(np.float32)

        return Line(self, positions, own[0] * own[1])

    @nn.nowrap
    def _rotations(self, rows: int, columns: int, even: bool) -> np.ndarray:
        """The rotations of a grid's patches, [rows * columns, 2 d]."""
        table = rope_table(rows, columns, self.embed_dim // self.heads)
        return table.reshape(rows * columns, -1).astype(np.float32)

    def _embed(self, images: Images, masked: Masked | None = None) -> tuple[Array, Rope | None]:
        """The first block's input, [B, h, w, c] -> [B, 1 + R + patches, D], and the rotations of all blocks."""
        check_channels(images, self.in_chans)
        grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        x = self.patch_embed(images)
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_token.astype(x.dtype), x)
        if self.positions == ROPE:
            table = rope_table(*grid, self.embed_dim // self.heads)
            return self._sequence(x), rope_of(table, 1 + self.registers, statistics_dtype(self.dtype))
        own = patch_grid(*self.image_size, self.patch_size)
        return self._sequence(x, jnp.asarray(resize_pos_embed(self.pos_embed, grid, own, self.positions))), None

    def _sequence(self, patches: Array, positions: Array | None = None) -> Array:
        """CLS, registers and patches [B, N, D], with `positions` [1 or B, 1 + N, D] added to all except registers."""
        batch, dtype = patches.shape[0], patches.dtype
        cls = jnp.broadcast_to(self.cls_token.astype(dtype), (batch, 1, self.embed_dim))
        x = jnp.concatenate([cls, patches], axis=1)
        if positions is not None:
            x += positions.astype(dtype)
        if not self.registers:
            return x
        registers = jnp.broadcast_to(self.register_tokens.astype(dtype), (batch, self.registers, self.embed_dim))
        return jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
