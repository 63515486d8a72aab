"""Torch state dicts of the reference files -> this package's variables, without using `dino_jax.weights`."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from dino_jax.models import Head, Tokens, ViT

_PATCHES = re.compile(r"^patch_embed\.proj(?=\.(weight|bias)$)")  # a ViT's; an XCiT's patch_embed.proj is a list
_LEAVES = {"weight": "kernel", "weight_g": "g", "weight_v": "v", "running_mean": "mean", "running_var": "var"}


def to_variables(state: dict[str, np.ndarray]) -> dict:
    """`{"params": ..., "batch_stats": ...}` with the arrays in their own dtype, linear kernels transposed."""
    variables: dict = {"params": {}, "batch_stats": {}}
    for name, value in state.items():
        *parts, leaf = _PATCHES.sub("patch_embed", name).split(".")
        if leaf == "num_batches_tracked":
            continue
        collection = "batch_stats" if leaf.startswith("running_") else "params"
        if leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        value = np.transpose(value, {2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]) if leaf == "weight" else value
        node = variables[collection]
        for part in _join_indices(parts):
            node = node.setdefault(part, {})
        node[_LEAVES.get(leaf, leaf)] = value
    return variables


def _join_indices(parts: list[str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        joined = [*joined[:-1], f"{joined[-1]}_{part}"] if part.isdigit() else [*joined, part]
    return joined


def section(data: dict[str, np.ndarray], prefix: str, dtype=None) -> dict[str, np.ndarray]:
    """The entries whose keys start with `prefix`, which is removed; converted to `dtype` if given."""
    found = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    return found if dtype is None else {key: value.astype(dtype) for key, value in found.items()}


def crops_of(data: dict[str, np.ndarray], step: int, count: int, dtype) -> list[np.ndarray]:
    """The crops of a trajectory's step, as the train step takes them: [B, 2, H, W, c] and [B, n, h, w, c]."""
    crops = [data[f"crops/{step}/{c}"].transpose(0, 2, 3, 1).astype(dtype) for c in range(count)]
    return [np.stack(crops[:2], axis=1), np.stack(crops[2:], axis=1)]


def sequence(tokens: Tokens) -> jnp.ndarray:
    """All tokens in the network's order, [..., N, D]: CLS, registers, patches row by row."""
    return jnp.concatenate([tokens.cls[..., None, :], tokens.registers, tokens.flat_patches], axis=-2)


def vit_of(state: dict[str, np.ndarray], heads: int, dtype) -> ViT:
    """The ViT of a torch state dict with a square position table."""
    kernel = state["patch_embed.proj.weight"]
    patch, side = kernel.shape[-1], round((state["pos_embed"].shape[1] - 1) ** 0.5)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return ViT(kernel.shape[0], depth, heads, patch, (side * patch,) * 2, kernel.shape[1], dtype)


def head_of(state: dict[str, np.ndarray], dtype) -> Head:
    """The head of a torch state dict; a gain other than 1 becomes a parameter, trained or not."""
    norm_last_layer = bool(np.all(state["last_layer.weight_g"] == 1))
    linear = [value for name, value in state.items() if name.endswith("weight") and value.ndim == 2]
    sizes = (state["last_layer.weight_v"].shape[0], linear[0].shape[0], linear[-1].shape[0], len(linear))
    return Head(*sizes, any("running_mean" in name for name in state), norm_last_layer, dtype)
