"""Pytrees as leaves by path, and their checksums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as `params/head/mlp_0/kernel`; named tuples look like dicts, tuples like lists."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): leaf for path, leaf in leaves}


def path_of(path: Any) -> str:
    """A JAX key path as text: `params/head/mlp_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_by_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over the leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)


def checksums(tree: PyTree) -> dict[str, int]:
    """A 32-bit checksum per leaf, independent of sharding; any change of one word changes it."""
    sums = {
        key: (_checksum if isinstance(leaf, jax.Array) else _host_checksum)(leaf) for key, leaf in by_path(tree).items()
    }
    return {key: int(value) for key, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Sum of the words times 2 * index + 1, modulo 2^32; 8-byte items are two words.

    The index is built from the axes, as a reshape would gather the shards.
    """
    kind = _WORDS[x.dtype.itemsize]
    words = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _host_checksum(x: np.ndarray) -> np.uint32:
    """The same for a host array, without a device, so one process can compute it alone."""
    words = np.ascontiguousarray(x).reshape(-1).view(_WORDS[x.dtype.itemsize]).astype(np.uint32)
    return np.sum(words * (2 * np.arange(words.size, dtype=np.uint32) + 1), dtype=np.uint32)


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by bytes per item
