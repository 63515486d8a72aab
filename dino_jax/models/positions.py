"""Positions of patches: learned tables resized to any grid, and rotary embeddings (RoPE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dino_jax.errors import UserError
from dino_jax.models.layers import Array, statistics_dtype
from dino_jax.models.resample import CUBIC, KEYS, resample_matrix, shrink_matrix

ROPE_BASE = 100.0  # DINOv3's base of the periods


def resize_matrix(source: int, target: int) -> np.ndarray:
    """Weights [target, source], float64, of DINO and DINOv2: no antialiasing, scale (target + 0.1) / source, a = -0.75.

    Official: `interpolate_pos_encoding` with offset 0.1.
    """
    return resample_matrix((np.arange(target) + 0.5) * source / (target + 0.1) - 0.5, source, CUBIC)


def antialias_matrix(source: int, target: int) -> np.ndarray:
    """Weights [target, source], float64, of DINOv2 with registers: antialiased, scale target / source, a = -0.5.

    Official: `interpolate_pos_encoding` with offset 0 and antialiasing.
    """
    return shrink_matrix(source, target, KEYS)


TABLES: dict[str, Callable[[int, int], np.ndarray]] = {"offset": resize_matrix, "antialias": antialias_matrix}
ROPE = "rope"  # no table


def resize_pos_embed(
    pos_embed: Float[Array | np.ndarray, "1 source D"],
    grid: tuple[int, int],
    table_grid: tuple[int, int] | None = None,
    how: str = "offset",
) -> Float[Array | np.ndarray, "1 target D"]:
    """Resizes the position table [1, 1 + N, D] to `grid` (rows, columns): [1, 1 + rows * columns, D], CLS first.

    `how`: a key of `TABLES`. As in the official `interpolate_pos_encoding` for images of whole patches: unchanged only
    if the grid is the table's own. (For images that are not square, the official code also resizes a table that fits;
    so does `ViT.any_size`.) `table_grid` is the table's (rows, columns); None: square. Computes in at least float32.
    """
    count = pos_embed.shape[1] - 1
    if table_grid is None:
        table_grid = (round(count**0.5), round(count**0.5))
    if table_grid[0] * table_grid[1] != count:
        raise UserError(f"a position table of {count} patches is not a grid of {table_grid[0]} x {table_grid[1]}")
    if tuple(grid) == tuple(table_grid):
        return pos_embed
    dtype = statistics_dtype(pos_embed.dtype)
    rows, columns = (jnp.asarray(TABLES[how](s, t), dtype) for s, t in zip(table_grid, grid, strict=True))
    cls, patches = pos_embed[:, :1].astype(dtype), pos_embed[:, 1:].astype(dtype)
    patches = patches.reshape(1, *table_grid, -1)  # [1, N, D] -> [1, rows, columns, D]
    patches = jnp.einsum("ir,jc,brcd->bijd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([cls, patches.reshape(1, -1, patches.shape[-1])], axis=1)


class Rope(NamedTuple):
    """Cosines and sines that rotate queries and keys, [N, d] or [B, N, d] for heads of width d."""

    cos: Array
    sin: Array


def rope_table(rows: int, columns: int, head_width: int) -> np.ndarray:
    """Cosines and sines of DINOv3's rotary embedding for a grid of patches, float64 [rows * columns, 2, d].

    A patch's coordinates are those of its center, from -1 to 1 along each axis. The angles are 2 pi coordinate /
    period, with periods 100^(j / (d / 4)), j < d / 4: first those of the rows, then of the columns, then both again.
    """
    periods = ROPE_BASE ** (np.arange(head_width // 4) / (head_width / 4))
    down, across = ((2 * np.arange(n) + 1) / n - 1 for n in (rows, columns))
    places = np.stack(np.broadcast_arrays(down[:, None], across[None, :]), axis=-1).reshape(-1, 2)
    angles = (2 * np.pi * places[:, :, None] / periods).reshape(len(places), -1)  # [N, d / 2]
    angles = np.tile(angles, 2)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rope_of(table: Float[Array | np.ndarray, "*B N 2 d"], others: int, dtype: jnp.dtype) -> Rope:
    """The rotations of a sequence of `others` tokens without a position, which stay as they are, then the patches."""
    still = [(0, 0)] * (table.ndim - 3) + [(others, 0), (0, 0)]
    cos = jnp.pad(jnp.asarray(table[..., 0, :], dtype), still, constant_values=1)
    return Rope(cos, jnp.pad(jnp.asarray(table[..., 1, :], dtype), still))


def rotate(x: Float[Array, "B N H d"], rope: Rope) -> Float[Array, "B N H d"]:
    """Rotates queries or keys: element j of a head pairs with j + d / 2. Computes in the type of `rope`."""
    wide = x.astype(rope.cos.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * rope.cos[..., None, :] + turned * rope.sin[..., None, :]).astype(x.dtype)
