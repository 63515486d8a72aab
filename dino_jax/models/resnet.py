"""ResNet in torchvision's layout (v1.5: the stride is in the 3 x 3 convolution), without the classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.models.backbone import Backbone
from dino_jax.models.layers import Array, check_channels, conv
from dino_jax.models.norm import BatchNorm
from dino_jax.models.packing import Extent, Images

# torchvision's `kaiming_normal_(mode="fan_out", nonlinearity="relu")`.
_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(nn.Module):
    """Residual block [B, h, w, c] -> [B, h/stride, w/stride, out]: two 3 x 3, or 1 x 1, 3 x 3, 1 x 1 (bottleneck)."""

    width: int
    stride: int
    bottleneck: bool
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layers = [(self.width, 3, self.stride), (self.width, 3, 1)]  # features, kernel size, stride
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        shortcut, out = x, layers[-1][0]
        for i, (features, size, stride) in enumerate(layers, start=1):
            x = conv(features, size, self, stride, use_bias=False, kernel_init=_kaiming, name=f"conv{i}")(x)
            x = BatchNorm(self.dtype, name=f"bn{i}")(x, train)
            x = nn.relu(x) if i < len(layers) else x
        if shortcut.shape[-1] != out or self.stride > 1:
            project = conv(out, 1, self, self.stride, use_bias=False, kernel_init=_kaiming, name="downsample_0")
            shortcut = BatchNorm(self.dtype, name="downsample_1")(project(shortcut), train)
        return nn.relu(x + shortcut)


class ResNet(Backbone):
    """Images [B, h, w, c] -> mean-pooled features [B, D]; `stages`: number of blocks in each of the four.

    `small_stem` starts with a 3 x 3 convolution of stride 1 and no pooling, for images of 32 pixels or so.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    small_stem: bool = False
    in_chans: int = 3
    dtype: Any = jnp.float32
    precision: Any = None
    remat: bool = False

    depth = 0  # no stochastic depth
    patch_size = None

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return 64 * 2 ** (len(self.stages) - 1) * (4 if self.bottleneck else 1)

    @nn.compact
    def __call__(
        self, images: Images, drop_path: Float[Array, "0 _ B"] | None = None, train: bool = False
    ) -> Float[Array, "B D"]:
        """Features [B, D] of normalized `images` [B, h, w, c]; `drop_path` is ignored."""
        check_channels(images, self.in_chans)
        size, stride = (3, 1) if self.small_stem else (7, 2)
        x = conv(64, size, self, stride, use_bias=False, kernel_init=_kaiming, name="conv1")(images.astype(self.dtype))
        x = nn.relu(BatchNorm(self.dtype, name="bn1")(x, train))
        if not self.small_stem:
            # After a ReLU, padding with 0 is as good as -inf; the ONNX converter fails on `max_pool` with padding.
            x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), window_shape=(3, 3), strides=(2, 2))
        block = nn.remat(Block, static_argnums=2) if self.remat else Block
        for stage, count in enumerate(self.stages):
            for i in range(count):
                stride = 2 if stage and not i else 1
                name = f"layer{stage + 1}_{i}"
                options = (64 * 2**stage, stride, self.bottleneck, self.dtype, self.precision)
                x = block(*options, name=name)(x, train)
        return x.mean(axis=(1, 2))  # [B, h/32, w/32, D] -> [B, D]

    @nn.nowrap
    def on_canvas(self, extent: Extent, call: Callable[..., Array], images: Images) -> Array:
        """See `packing.Canvas`: rescales the mean, which counts the last map's empty cells."""
        stride = (1 if self.small_stem else 4) * 2 ** (len(self.stages) - 1)  # pixels per cell
        cells = images.shape[1] * images.shape[2] // stride**2
        feature = call(images)  # [B, D]
        own = jnp.prod(extent.sizes_in(stride), axis=1).astype(feature.dtype)  # [B]
        return feature * (cells / own)[:, None]

    @nn.nowrap
    def drop_rates(self, rate: float) -> np.ndarray:
        """Stochastic depth rates [0, 2]: none."""
        return np.zeros((0, 2))
