"""Batches of images of different sizes, padded and masked: same results as one image at a time, up to rounding.

A ViT gets its patches as one line, padded to one of a few lengths. Other backbones get the image in the upper left
corner of a canvas of one of a few sizes; whatever a layer writes beyond the image is reset to 0, like padding. So the
number of compilations is bounded for any mix of sizes.

Legend: B batch, N tokens, D width; h, w an image's own size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Array = jax.Array
Images = Float[jax.Array | np.ndarray, "B h w c"]  # normalised


class Packed(NamedTuple):
    """An image ready for a batch, its `inputs` for the forward pass; images with equal keys can share a batch."""

    key: Any
    inputs: tuple[np.ndarray, ...]
    tokens: float  # its cost, in patches of about 16 x 16
    grid: tuple[int, int]  # the image's rows and columns of patches
    layout: tuple[int, int]  # those of the output, with the image's at the upper left

    def own(self, patches: np.ndarray) -> np.ndarray:
        """The image's patch tokens [rows, columns, D], from its row [N, D] of the batch's output."""
        rows, columns = self.layout
        return patches[: rows * columns].reshape(rows, columns, -1)[: self.grid[0], : self.grid[1]]


@runtime_checkable
class AnySize(Protocol):
    """How a backbone takes images of any size: `pack` each on the host, `forward` a batch on the device."""

    def pack(self, image: np.ndarray) -> Packed:
        """Packs a normalized float32 image [h, w, c] of at least one patch; cuts off what exceeds whole patches."""

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> tuple[Array, Array | None]:
        """CLS or pooled feature [B, D] and, with `patches`, the patch tokens [B, N, D], both after the final norm."""


def round_up(count: int) -> int:
    """Rounds up to one of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four per doubling, at most 25% more."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class Line:
    """Patches in a line, each with its position; attention ignores the padding.

    `positions(rows, columns, even)` returns the patches' position features [rows * columns, F]; `even`: as many pixels
    were cut off at the right as at the bottom. An image of `native` patches, the common case, is not padded.
    `forward` calls the backbone's `line(strips, positions, valid, patches)`: `strips` [B, p, N * p, c], `positions`
    [B, N, F], `valid` bool [B, N], False for padding.
    """

    def __init__(self, backbone: Any, positions: Callable[[int, int, bool], np.ndarray], native: int):
        self.backbone, self.positions, self.native = backbone, positions, native
        self._known: dict[tuple[int, int, bool], np.ndarray] = {}

    def pack(self, image: np.ndarray) -> Packed:
        patch, channels = self.backbone.patch_size, image.shape[-1]
        (rows, down), (columns, right) = (divmod(length, patch) for length in image.shape[:2])
        count = rows * columns
        length = count if count == self.native else 4 * round_up(-(-count // 4))
        strip = image[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, channels)
        strip = strip.transpose(1, 0, 2, 3, 4).reshape(patch, count * patch, channels)
        strip = np.pad(strip, ((0, 0), (0, (length - count) * patch), (0, 0)))
        place = rows, columns, down == right
        if place not in self._known:
            self._known[place] = self.positions(*place)
        positions = np.pad(self._known[place], ((0, length - count), (0, 0)))
        inputs = strip, positions, np.arange(length) < count
        return Packed(length, inputs, length, (rows, columns), (rows, columns))

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> tuple[Array, Array | None]:
        out: tuple[Array, Array | None] = self.backbone.apply(variables, *inputs, patches, method="line")
        return out


class Canvas:
    """The image in the upper left corner of a canvas of zeros; everything beyond it stays 0.

    A layer that mixes positions has a method `on_canvas(extent, call, *inputs)` that wraps its call: see `Extent`.
    `features(rows, columns)` returns the patches' position features [rows, columns, F], passed on as `Extent.features`.
    """

    def __init__(self, backbone: Any, features: Callable[[int, int], np.ndarray] | None = None):
        self.backbone, self.features = backbone, features
        self.unit = backbone.patch_size or 32  # pixels; sides of a canvas are multiples of it

    def pack(self, image: np.ndarray) -> Packed:
        patch = self.backbone.patch_size or 1
        image = image[: image.shape[0] // patch * patch, : image.shape[1] // patch * patch]
        rows, columns = (-(-length // self.unit) for length in image.shape[:2])
        canvas = round_up(rows), round_up(columns)
        empty = [(0, count * self.unit - length) for count, length in zip(canvas, image.shape[:2], strict=True)]
        inputs: tuple[np.ndarray, ...] = (np.pad(image, (*empty, (0, 0))), np.array(image.shape[:2], np.int32))
        if self.features is not None:
            features = self.features(rows, columns).astype(np.float32)
            inputs += (np.pad(features, ((0, canvas[0] - rows), (0, canvas[1] - columns), (0, 0))),)
        return Packed(canvas, inputs, canvas[0] * canvas[1] * (self.unit / 16) ** 2, (rows, columns), canvas)

    def forward(self, variables: Any, inputs: tuple[Array, ...], patches: bool) -> tuple[Array, Array | None]:
        images, sizes, *features = inputs
        extent = Extent(images.shape[1], images.shape[2], self.unit, sizes, *features)
        with nn.intercept_methods(extent.intercept):
            if not patches:
                cls: Any = self.backbone.apply(variables, images)
                return cls, None
            tokens: Any = self.backbone.apply(variables, images, method="tokens")  # [1, B, ...]
            return tokens.cls[0], tokens.flat_patches[0]


class Extent:
    """Which part of each canvas holds its image: `sizes` [B, 2] are the images' own (h, w)."""

    def __init__(self, height: int, width: int, unit: int, sizes: Array, features: Any = None):
        self.height, self.sizes, self.features = height, sizes, features
        self.grid = height // unit, width // unit  # of patches

    def valid(self, rows: int, columns: int) -> Array:
        """Which cells of the canvases' map [rows, columns] belong to an image, bool [B, rows, columns]."""
        own = self.sizes_in(self.height // rows)  # [B, 2]
        down, across = jnp.arange(rows) < own[:, :1], jnp.arange(columns) < own[:, 1:]
        return down[:, :, None] & across[:, None, :]

    def sizes_in(self, stride: int) -> Array:
        """Each image's rows and columns in a map with `stride` pixels per cell, [B, 2]."""
        return -(-self.sizes // stride)

    def patches(self) -> Array:
        """Which patch tokens (row by row) belong to an image, bool [B, N]."""
        return self.valid(*self.grid).reshape(len(self.sizes), -1)

    def clean(self, x: Array) -> Array:
        """Sets the map `x` [B, rows, columns, D] to 0 beyond the images."""
        return x * self.valid(x.shape[1], x.shape[2])[..., None]

    def intercept(self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """For `nn.intercept_methods`: calls modules through their `on_canvas`, if they have one."""
        on_canvas = getattr(context.module, "on_canvas", None)
        if on_canvas is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        return on_canvas(self, call, *args, **kwargs)
