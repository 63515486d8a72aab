"""Trees of arrays as leaves by path, and checksums of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, `params/head/mlp_0/kernel`; named tuples and dicts, tuples and lists read alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): leaf for path, leaf in leaves}


def path_of(path: Any) -> str:
    """A leaf's path as JAX has it, as text: `params/head/mlp_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_by_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`function(path, leaf)` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)


def checksums(tree: PyTree) -> dict[str, int]:
    """A number of 32 bits per leaf: the same for any layout on any devices, changed by any change of one word."""
    sums = {
        key: (_checksum if isinstance(leaf, jax.Array) else _host_checksum)(leaf) for key, leaf in by_path(tree).items()
    }
    return {key: int(value) for key, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Sum of the array's words, each times an odd number of its place, modulo 2^32; items of 8 bytes are two words.

    The place is built from the axes: a reshape would gather the shards.
    """
    kind = _WORDS[x.dtype.itemsize]
    words = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _host_checksum(x: np.ndarray) -> np.uint32:
    """The same of an array on the host, without a device: one process may do this alone."""
    words = np.ascontiguousarray(x).reshape(-1).view(_WORDS[x.dtype.itemsize]).astype(np.uint32)
    return np.sum(words * (2 * np.arange(words.size, dtype=np.uint32) + 1), dtype=np.uint32)


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by bytes an item
