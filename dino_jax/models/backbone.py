"""The contract of the backbones: what each declares and answers, and its tokens, apart by kind.

Whatever uses a backbone goes by this module; only `models` knows how one family differs from another.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import numpy as np

from dino_jax.errors import UserError
from dino_jax.models.layers import Array, patch_grid
from dino_jax.models.packing import AnySize, Canvas, Images


class Tokens(NamedTuple):
    """Tokens after the final norm, apart by kind; `...` stands for the axes in front, such as [n, B].

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
    """The parts of a sequence [..., 1 + R + rows * columns, D]: CLS, R registers, the patches of `grid` row by row."""
    first = 1 + registers
    return Tokens(x[..., 0, :], x[..., 1:first, :], x[..., first:, :].reshape(*x.shape[:-2], *grid, x.shape[-1]))


class Backbone(nn.Module):
    """A function from normalized images [B, h, w, c] to features [B, D]: `(images, drop_path=None, train=False)`.

    A subclass has these attributes; `registers` and `linear_features` only where it differs from what is here:
      embed_dim: D.
      depth: blocks with stochastic depth, the rows of the drop-path factors.
      patch_size: pixels; None where there are neither patch tokens nor attention.
      registers: R, the number of tokens that are neither CLS nor patches.
      linear_features: what the linear evaluation reads unless told otherwise (see `eval.protocols.linear`).
    """

    registers = 0
    linear_features: ClassVar[tuple[str, ...]] = ("1",)

    def tokens(self, images: Images, n: int = 1) -> Tokens:
        """Tokens of the last `n` blocks, axes [n, B] in front, each through the final norm; `UserError` if none."""
        raise UserError(f"a {type(self).__name__} has no tokens, only pooled features: use a ViT or an XCiT")

    def attention(self, images: Images, block: int = -1) -> Array:
        """Attention [B, H, N, N] of one block (negative: from the end), or its first row, that of CLS: [B, H, 1, N].

        Tokens are in the network's order: CLS, registers, patches row by row. Rows sum to 1. `UserError` if none.
        """
        raise UserError(f"a {type(self).__name__} has no attention: use a ViT or an XCiT")

    def cls_attention(self, images: Images, block: int = -1) -> Array:
        """What CLS attends to among the patches in one block, [B, H, rows, columns]."""
        weights = self.attention(images, block)
        rows, columns = patch_grid(images.shape[1], images.shape[2], self.patch_size)
        return weights[:, :, 0, 1 + self.registers :].reshape(*weights.shape[:2], rows, columns)

    @nn.nowrap
    def drop_rates(self, rate: float) -> np.ndarray:
        """Stochastic depth rates [depth, branches] for `model.drop_path`."""
        raise NotImplementedError

    @nn.nowrap
    def flops(self, height: int, width: int) -> tuple[float, float] | None:
        """FLOPs of a forward pass on one image: of what comes before the blocks, and of the blocks. None: unknown.

        Matrix products only, a multiplication and an addition each.
        """
        return None

    @nn.nowrap
    def any_size(self, variables: Any) -> AnySize:
        """How images of any size share batches (`models.packing`); `variables` as NumPy arrays."""
        return Canvas(self)
