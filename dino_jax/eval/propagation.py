"""Label propagation between video frames (official `eval_video_segmentation.py`; paper section 4.2).

Every patch of a new frame takes the labels of its most similar patches in the context frames, weighted by
exp(cosine similarity / T) and normalized. Patches see at most `radius` rows and columns away, so the frame is processed
in tiles, each against its local window. The full affinity matrix is never built.

Legend: n context frames, h x w patches, D width, L labels, t tile side, s = t + 2 * radius window side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, UInt8

from dino_jax.eval.images import linear_matrix
from dino_jax.models.layers import unit

TILE = 8  # patches


def propagate(
    context_features: Float[jax.Array | np.ndarray, "n h w D"],
    target_features: Float[jax.Array | np.ndarray, "h w D"],
    context_labels: Float[jax.Array | np.ndarray, "n h w L"],
    valid: Bool[np.ndarray, " n"] | None = None,
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
    devices: Sequence[jax.Device] | None = None,
) -> Float[jax.Array, "h w L"]:
    """Propagates labels to the target frame: soft labels [h, w, L].

    Args:
      context_features: [n, h, w, D] float; need not be normalized.
      target_features: [h, w, D] float.
      context_labels: [n, h, w, L] float, e.g. one-hot or earlier results.
      valid: bool [n], which context frames to use; default all.
      radius: window radius in rows and columns; 0 or less: the whole frame.
      topk: number of source patches, over all context frames together.
      temperature: T.
      devices: shard the tiles over these; default all of this process.
    """
    count, height, width, _ = context_features.shape
    reach = min(radius, max(height, width)) if radius > 0 else max(height, width)
    valid = np.ones(count, bool) if valid is None else valid
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    step = _compiled(mesh, height, width, reach, topk, temperature)
    return step(context_features, target_features, context_labels, valid)


@functools.lru_cache(maxsize=16)
def _compiled(
    mesh: Mesh, height: int, width: int, reach: int, topk: int, temperature: float
) -> Callable[..., jax.Array]:
    rows, columns = -(-height // TILE), -(-width // TILE)
    count = -(-rows * columns // mesh.size) * mesh.size  # surplus tiles repeat the last one
    corners = np.array([(TILE * i, TILE * j) for i in range(rows) for j in range(columns)], np.int32)
    corners = np.concatenate([corners, np.repeat(corners[-1:], count - len(corners), 0)])

    def local(corners, sources, target, labels, inside):
        tile = functools.partial(_tile, sources, target, labels, inside, reach, topk, temperature)
        return jax.lax.map(tile, corners)  # [tiles, t, t, L]

    tiles = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P(), P(), P()), out_specs=P("data"))

    def step(sources, target, labels, valid):
        def pad(x, low):  # to whole tiles, plus `low` on every side
            sides = [(low, low + rows * TILE - height), (low, low + columns * TILE - width)]
            return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + sides + [(0, 0)])

        inside = jnp.broadcast_to(valid[:, None, None, None], (*sources.shape[:3], 1))
        out = tiles(corners, pad(unit(sources), reach), pad(unit(target), 0), pad(labels, reach), pad(inside, reach))
        out = out[: rows * columns].reshape(rows, columns, TILE, TILE, -1)
        return out.transpose(0, 2, 1, 3, 4).reshape(rows * TILE, columns * TILE, -1)[:height, :width]

    return jax.jit(step)


def _tile(
    sources: jax.Array,
    target: jax.Array,
    labels: jax.Array,
    inside: jax.Array,
    reach: int,
    topk: int,
    temperature: float,
    corner: jax.Array,
) -> jax.Array:
    """The labels [t, t, L] of one tile; in the padded sources its window starts at `corner`."""
    side = TILE + 2 * reach
    window = lambda x: jax.lax.dynamic_slice(  # noqa: E731  [n, s, s, .] -> [n * s * s, .]
        x, (0, corner[0], corner[1], 0), (x.shape[0], side, side, x.shape[3])
    ).reshape(-1, x.shape[3])
    query = jax.lax.dynamic_slice(target, (corner[0], corner[1], 0), (TILE, TILE, target.shape[2]))
    query = query.reshape(TILE * TILE, -1)  # [t * t, D]
    offset = np.arange(side)[None] - np.arange(TILE)[:, None]  # [t, s]: `reach` at the patch itself
    near = (offset >= 0) & (offset <= 2 * reach)
    near = (near[:, None, :, None] & near[None, :, None, :]).reshape(TILE * TILE, 1, -1)  # [t * t, 1, s * s]
    seen = (near & window(inside).reshape(1, sources.shape[0], -1)).reshape(TILE * TILE, -1)  # [t * t, n * s * s]
    similarity = jnp.matmul(query, window(sources).T, precision="highest")
    best, index = jax.lax.top_k(jnp.where(seen, similarity, -jnp.inf), min(topk, similarity.shape[1]))
    weights = jax.nn.softmax(best / temperature, axis=-1)  # [t * t, k]
    mixed = jnp.einsum("qk,qkl->ql", weights, window(labels)[index], precision="highest")
    return mixed.reshape(TILE, TILE, -1)


def hard_labels(soft: Float[jax.Array | np.ndarray, "h w L"], scale: int) -> UInt8[jax.Array, "y x"]:
    """Label map uint8 [scale * h, scale * w] from soft labels [h, w, L].

    Bilinear upsampling (half-pixel centers, edges repeated), each label rescaled to 0..1 over the image, argmax.
    """
    height, width, _ = soft.shape
    rows, columns = (jnp.asarray(linear_matrix(size, size * scale), soft.dtype) for size in (height, width))
    large = jnp.einsum("yh,xw,hwl->yxl", rows, columns, soft, precision="highest")
    low = large.min((0, 1))
    span = large.max((0, 1)) - low
    stretched = (large - low) / jnp.where(span > 0, span, 1)
    return jnp.argmax(jnp.where(large.max((0, 1)) > 0, stretched, large), axis=-1).astype(jnp.uint8)
