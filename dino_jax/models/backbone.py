"""The backbone interface, and tokens separated by kind.

Code outside `models` uses backbones only through this interface.
"""

from __future__ import annotations

import functools
import re
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from dino_jax.errors import UserError
from dino_jax.models.layers import Array, patch_grid
from dino_jax.models.packing import AnySize, Canvas, Images


class Tokens(NamedTuple):
    """Tokens after the final norm, separated by kind; `...` are leading axes such as [n, B].

    Attributes:
      cls: [..., D].
      registers: [..., R, D]; R may be 0.
      patches: [..., rows, columns, D].
    """

    cls: Array
    registers: Array
    patches: Array

    @property
    def flat_patches(self) -> Array:
        """The patches row by row, [..., rows * columns, D]."""
        return self.patches.reshape(*self.patches.shape[:-3], -1, self.patches.shape[-1])


def split_tokens(x: Array, registers: int, grid: tuple[int, int]) -> Tokens:
    """Splits a sequence [..., 1 + R + rows * columns, D] into CLS, R registers and patches (row by row)."""
    first = 1 + registers
    return Tokens(x[..., 0, :], x[..., 1:first, :], x[..., first:, :].reshape(*x.shape[:-2], *grid, x.shape[-1]))


class Backbone(nn.Module):
    """A function from normalized images [B, h, w, c] to features [B, D]: `(images, drop_path=None, train=False)`.

    A subclass has these attributes; `registers` and `linear_features` have defaults:
      embed_dim: D.
      depth: number of blocks with stochastic depth, axis 0 of the drop-path factors.
      patch_size: in pixels; None if there are no patch tokens and no attention.
      registers: R, the number of tokens that are neither CLS nor patches.
      linear_features: what the linear evaluation reads by default (see `eval.protocols.linear`).
    """

    registers = 0
    linear_features: ClassVar[tuple[str, ...]] = ("1",)

    def tokens(self, images: Images, n: int = 1) -> Tokens:
        """Tokens of the last `n` blocks after the final norm, leading axes [n, B]; `UserError` if it has none."""
        raise UserError(f"a {type(self).__name__} has no tokens, only pooled features: use a ViT or an XCiT")

    def attention(self, images: Images, block: int = -1) -> Array:
        """Attention [B, H, N, N] of one block (negative: from the end), or only CLS's row [B, H, 1, N].

        Tokens are in the network's order: CLS, registers, patches row by row. Rows sum to 1. `UserError` if none.
        """
        raise UserError(f"a {type(self).__name__} has no attention: use a ViT or an XCiT")

    def cls_attention(self, images: Images, block: int = -1) -> Array:
        """Attention from CLS to the patches in one block, [B, H, rows, columns]."""
        weights = self.attention(images, block)
        rows, columns = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        return weights[:, :, 0, 1 + self.registers :].reshape(*weights.shape[:2], rows, columns)

    @nn.nowrap
    def drop_rates(self, rate: float) -> np.ndarray:
        """Stochastic depth rates [depth, branches] for `model.drop_path`."""
        raise NotImplementedError

    @nn.nowrap
    def flops(self, height: int, width: int) -> tuple[float, float] | None:
        """Forward FLOPs on one image: before the blocks, and in the blocks. None: unknown.

        Matrix products only; a multiplication and an addition count as 2.
        """
        return None

    @nn.nowrap
    def any_size(self, variables: Any) -> AnySize:
        """How images of any size share batches (`models.packing`); `variables` as NumPy arrays."""
        return Canvas(self)


def layers_of(params: Any) -> Any:
    """Layer number of each parameter of a backbone, for layer-wise learning rates.

    0 for embeddings, then one per block, then one for everything after the blocks. XCiT's class-attention blocks come
    after the other blocks.
    """
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    names = jax.tree_util.tree_map_with_path(lambda path, _: name(path), params)
    blocks = sorted({block for name in jax.tree.leaves(names) if (block := _block(name))})

    def layer(name: str) -> int:
        if block := _block(name):
            return 1 + blocks.index(block)
        return 0 if re.search(r"_token|pos_embed|patch_embed", name) else len(blocks) + 1

    return jax.tree.map(layer, names)


def _block(name: str) -> tuple[bool, int] | None:
    """A parameter's block: (is class attention, number), or None."""
    found = re.search(r"(cls_attn_)?blocks_(\d+)/", name)
    return None if found is None else (found[1] is not None, int(found[2]))
