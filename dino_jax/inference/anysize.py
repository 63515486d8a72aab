"""Pictures of different sizes in one batch, filled up and masked: each gives what it gives alone, to rounding.

A ViT takes its patches as one line, filled up to one of a few lengths; the others take the picture in the corner of one
of a few canvases, and whatever a layer writes beyond the picture is set to 0 again, as if the border were padding.
So the number of compilations is bounded, whatever sizes come.

Legend: B batch, N tokens, D width, H heads; h, w a picture's own size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dino_jax.models import ResNet, ViT, XCiT
from dino_jax.models.layers import Array, Attention
from dino_jax.models.norm import BatchNorm
from dino_jax.models.vit import resize_matrix
from dino_jax.models.xcit import ChannelAttention, LocalInteraction, fourier_features


class Filled(NamedTuple):
    """A picture ready for a batch: with which it can share one, what the forward pass takes, and its cost and grid."""

    key: Any
    inputs: tuple[np.ndarray, ...]
    tokens: float  # about so many patches of 16 x 16
    grid: tuple[int, int]  # its own rows and columns of patch tokens ...
    layout: tuple[int, int]  # ... in the upper left corner of these


class AnySize(Protocol):
    """`fill` on the host for each picture; `forward` on the device for a batch of what shares a key."""

    def fill(self, image: np.ndarray) -> Filled:
        """A normalised float32 picture [h, w, c], h and w multiples of the patch."""

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> Array:
        """[B, 1 + N, D], CLS or pooled feature first; without `patches` that alone, [B, 1, D]."""


def any_size(backbone: Any, variables: Any) -> AnySize:
    """How this backbone takes pictures of any size; `variables` as NumPy arrays."""
    return Line(backbone, variables) if isinstance(backbone, ViT) else Canvas(backbone)


def round_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four to each doubling, at most a quarter further."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class Line:
    """A ViT: patches side by side, with a position for each, and attention that sees only those that are there."""

    def __init__(self, backbone: ViT, variables: Any):
        self.backbone = backbone
        self.table = np.asarray(variables["params"]["pos_embed"], np.float64)[0]
        self.own = tuple(size // backbone.patch_size for size in backbone.image_size)
        self._positions: dict[tuple[int, int], np.ndarray] = {}

    def fill(self, image: np.ndarray) -> Filled:
        patch, channels = self.backbone.patch_size, image.shape[-1]
        rows, columns = image.shape[0] // patch, image.shape[1] // patch
        count = rows * columns
        length = count if count == self.own[0] * self.own[1] else 4 * round_up(-(-count // 4))
        strip = image.reshape(rows, patch, columns, patch, channels).transpose(1, 0, 2, 3, 4)
        strip = np.pad(strip.reshape(patch, count * patch, channels), ((0, 0), (0, (length - count) * patch), (0, 0)))
        positions = np.pad(self.positions(rows, columns), ((0, length - count), (0, 0)))
        return Filled(
            length, (strip, positions, np.arange(1 + length) <= count), length, (rows, columns), (rows, columns)
        )

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> Array:
        tokens: Any = self.backbone.apply(variables, *inputs, patches, method=_line_tokens)
        return tokens

    def positions(self, rows: int, columns: int) -> np.ndarray:
        """The position table for a grid, CLS first: [1 + rows * columns, D] float32, by the official resize."""
        if (rows, columns) not in self._positions:
            patches = self.table[1:]
            if (rows, columns) != self.own:
                down, across = resize_matrix(self.own[0], rows), resize_matrix(self.own[1], columns)
                patches = np.einsum("ir,jc,rcd->ijd", down, across, patches.reshape(*self.own, -1), optimize=True)
            flat = np.concatenate([self.table[:1], patches.reshape(rows * columns, -1)])
            self._positions[rows, columns] = flat.astype(np.float32)
        return self._positions[rows, columns]


def _line_tokens(backbone: ViT, strips: Array, positions: Array, valid: Array, patches: bool) -> Array:
    """`strips` [B, p, N * p, c]; `positions` [B, 1 + N, D]; `valid` bool [B, 1 + N]: CLS and what is no filling."""
    x = backbone.patch_embed(strips)  # [B, N, D]
    cls = jnp.broadcast_to(backbone.cls_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)
    for block in backbone.blocks:
        x = block(x, valid=valid)
    return backbone.norm(x if patches else x[:, :1])


class Canvas:
    """A ResNet or XCiT: the picture in the upper left corner of a canvas of zeros, everything beyond it kept at 0."""

    def __init__(self, backbone: ResNet | XCiT):
        self.backbone = backbone
        self.unit = backbone.patch_size or 32  # a canvas is a multiple of so many pixels

    def fill(self, image: np.ndarray) -> Filled:
        rows, columns = (-(-length // self.unit) for length in image.shape[:2])
        canvas = tuple(round_up(count) for count in (rows, columns))
        empty = [(0, count * self.unit - length) for count, length in zip(canvas, image.shape[:2], strict=True)]
        inputs: tuple[np.ndarray, ...] = (np.pad(image, (*empty, (0, 0))), np.array(image.shape[:2], np.int32))
        if isinstance(self.backbone, XCiT):
            features = fourier_features(rows, columns)[0].astype(np.float32)  # [rows, columns, 64]
            inputs += (np.pad(features, ((0, canvas[0] - rows), (0, canvas[1] - columns), (0, 0))),)
        cost = canvas[0] * canvas[1] * (self.unit / 16) ** 2
        return Filled(canvas, inputs, cost, (rows, columns), (canvas[0], canvas[1]))

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> Array:
        images, sizes, *fourier = inputs
        with nn.intercept_methods(_cleaner(images.shape[1], sizes, *fourier)):
            if patches:
                tokens: Any = self.backbone.apply(variables, images, method="tokens")  # [1, B, 1 + N, D]
                return tokens[0]
            feature: Any = self.backbone.apply(variables, images)  # [B, D]
        if isinstance(self.backbone, ResNet):  # its mean counted the empty cells of the last map
            stride = 8 if self.backbone.small_stem else 32
            cells = images.shape[1] * images.shape[2] // stride**2
            own = jnp.prod(-(-sizes // stride), axis=1).astype(feature.dtype)  # [B]
            feature = feature * (cells / own)[:, None]
        return feature[:, None]


def _cleaner(height: int, sizes: Array, fourier: Any = None) -> Callable[..., Any]:
    """A Linen interceptor that keeps every map [B, H, W, D] at 0 beyond the pictures' `sizes` [B, 2] (h, w).

    `height`: the canvas's, in pixels. `fourier` [B, rows, columns, 64]: XCiT's position features of each picture's own
    grid. Convolutions need clean inputs; channel attention sums over tokens, so it needs clean queries, keys, values.
    """

    def valid(rows: int, columns: int) -> Array:
        stride = height // rows  # pixels
        own = -(-sizes // stride)  # [B, 2]
        down, across = jnp.arange(rows) < own[:, :1], jnp.arange(columns) < own[:, 1:]
        return down[:, :, None] & across[:, None, :]  # [B, rows, columns]

    def clean(x: Array) -> Array:
        return x * valid(x.shape[1], x.shape[2])[..., None]

    def tokens(x: Array) -> Array:
        return valid(*fourier.shape[1:3]).reshape(x.shape[0], -1)  # [B, N]

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, BatchNorm):
            return clean(call(*args, **kwargs))
        if module.name == "token_projection":
            return call(fourier.astype(args[0].dtype), **kwargs)
        if isinstance(module, LocalInteraction):
            return call(args[0] * tokens(args[0])[..., None], *args[1:], **kwargs)
        if isinstance(module.parent, ChannelAttention) and module.name == "qkv":
            return call(*args, **kwargs) * tokens(args[0])[..., None]
        if isinstance(module, Attention):
            return call(args[0], jnp.pad(tokens(args[0]), ((0, 0), (1, 0)), constant_values=True))
        return call(*args, **kwargs)

    return intercept
