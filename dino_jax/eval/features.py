"""Frozen features: a network that is only looked at, run over pictures, jitted, batched and spread over the devices.

Every protocol builds on three things here: `Frozen`, a backbone with its weights; `run`, which maps any method of the
backbone over batches of pictures; and `extract`, which collects the features and labels of a whole data set.

Legend: B batch, N tokens, D width, n blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dino_jax.errors import UserError


class Frozen(NamedTuple):
    """A backbone and its weights; `variables` is `{"params": ..., "batch_stats": ...}`, mean and std are of 0..1."""

    backbone: nn.Module
    variables: Any
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def cls_feature(backbone: nn.Module, images: jax.Array) -> jax.Array:
    """The output of the backbone: CLS after the final norm, or the pooled map of a ResNet. [B, D]."""
    return backbone(images)


@functools.lru_cache
def linear_feature(n: int, avgpool: bool) -> Callable[[nn.Module, jax.Array], jax.Array]:
    """The method that gives `pool_tokens` of the last n blocks (one function object per choice, so it compiles once)."""
    return lambda backbone, images: pool_tokens(backbone.tokens(images, n), avgpool)


def pool_tokens(tokens: jax.Array, avgpool: bool) -> jax.Array:
    """The input of the official linear heads, from the tokens [n, B, N, D] of the last n blocks.

    Without `avgpool`: the CLS tokens side by side, [B, n * D]. With it and n = 1: CLS and mean patch token *interleaved*,
    [cls0, avg0, cls1, avg1, ...], as released heads expect, [B, 2 * D]. With it and n > 1, which the official code does
    not offer: the mean patch token of the last block after the CLS tokens, [B, (n + 1) * D].
    """
    cls = jnp.moveaxis(tokens[:, :, 0], 0, 1).reshape(tokens.shape[1], -1)  # [n, B, D] -> [B, n * D]
    if not avgpool:
        return cls
    mean = jnp.mean(tokens[-1, :, 1:], axis=1)  # [B, D]
    if len(tokens) > 1:
        return jnp.concatenate([cls, mean], axis=1)
    return jnp.stack([cls, mean], axis=-1).reshape(tokens.shape[1], -1)  # [B, D, 2] -> [B, 2 * D]


def run(
    model: Frozen,
    method: Callable[[nn.Module, jax.Array], Any],
    batches: Iterable[dict[str, np.ndarray]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """Yields (method(backbone, normalised images), batch) for each batch, in order, as NumPy arrays.

    `batch["image"]` is uint8 [B, h, w, C]. Batches are filled up to the devices (the filling never comes back), and the
    next one is under way while the last is being copied. Each process runs its own batches on its own devices.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    forward = _forward(model.backbone, method, tuple(model.mean), tuple(model.std), mesh)
    variables = jax.device_put(model.variables, NamedSharding(mesh, P()))
    waiting = None
    for batch in batches:
        images = np.asarray(batch["image"])
        filled = np.zeros((-(-len(images) // mesh.size) * mesh.size, *images.shape[1:]), images.dtype)
        filled[: len(images)] = images
        outputs = forward(variables, jax.device_put(filled, NamedSharding(mesh, P("data"))))
        if waiting is not None:
            yield _fetch(*waiting)
        waiting = outputs, batch
    if waiting is not None:
        yield _fetch(*waiting)


def _fetch(outputs: Any, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    return jax.tree.map(lambda x: np.asarray(x)[: len(batch["image"])], outputs), batch


@functools.lru_cache(maxsize=32)
def _forward(backbone: nn.Module, method: Callable, mean: tuple, std: tuple, mesh: Mesh):
    def forward(variables, images):
        images = images.astype(jnp.float32) / 255
        images = (images - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)
        return backbone.apply(variables, images, method=method)

    return jax.jit(forward, out_shardings=NamedSharding(mesh, P("data")))


def extract(
    model: Frozen,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    method: Callable[[nn.Module, jax.Array], jax.Array] = cls_feature,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] float32 and labels [N] int64 of all pictures, in order.

    Args:
      batches: dicts with `image` uint8 [B, h, w, C] and `label` int [B]; the last one may be shorter.
      method: what to take from the backbone, e.g. `cls_feature` or `linear_feature(4, False)`.
      progress: called after each batch with the number of pictures done so far.

    Raises:
      UserError: no pictures at all.
    """
    features, labels, done = [], [], 0
    for output, batch in run(model, method, batches, devices=devices):
        features.append(np.asarray(output, np.float32))
        labels.append(np.asarray(batch["label"], np.int64))
        done += len(labels[-1])
        if progress is not None:
            progress(done)
    if not features:
        raise UserError("the data set holds no pictures: check --data")
    return np.concatenate(features), np.concatenate(labels)
