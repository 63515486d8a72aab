"""Key tables: map the tensors of a weight file to parameters here, in both directions.

A table is built from a model's variable shapes and one format's naming rules, so every key and shape is known before a
file is opened: the file fits exactly, or the error lists the differences. Torch stores linear weights as [out, in] and
convolutions as [out, in, h, w]; Flax as [in, out] and [h, w, in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dino_jax.errors import UserError

Tensors = Mapping[str, np.ndarray]
Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}
Rules = Sequence[tuple[str, str]]

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
LEAVES |= {"v": "weight_v", "g": "weight_g"}  # torch's weight_norm
COUNTER = "num_batches_tracked"  # torch's batch-norm counter, unused with a fixed momentum

# How each format's names differ from torch_name(): (pattern, replacement), applied in order.
# Braces: several tensors in the file that are one parameter here, joined along the first axis.
VIT = ((r"^patch_embed\.", "patch_embed.proj."),)
RESNET: Rules = ()
XCIT: Rules = ()
XCIT_TIMM = ((r"^pos_embeder\.", "pos_embed."), (r"^(cls_attn_blocks\.\d+\.attn)\.qkv\.", r"\1.{q,k,v}."))
HUGGING_FACE = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.", "embeddings.patch_embeddings.projection."),
    (r"\.attn\.qkv\.", ".attention.attention.{query,key,value}."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
)
HUGGING_FACE_5 = (  # in-memory names since transformers 5; save_pretrained still writes the ones above
    *HUGGING_FACE[:3],
    (r"\.attn\.qkv\.", ".attention.{q,k,v}_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    *HUGGING_FACE[5:7],
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "layers."),
)


class Entry(NamedTuple):
    """One parameter: its path in the variables, its keys in the file, and the shape under each key."""

    path: tuple[str, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]


def torch_name(path: Sequence[str]) -> str:
    """`(params, blocks_0, attn, qkv, kernel)` -> `blocks.0.attn.qkv.weight`."""
    *modules, leaf = path[1:]
    parts = [re.sub(r"_(?=\d)", ".", module) for module in modules]
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


def renamed(name: str, rules: Rules) -> str:
    """The format's name for the tensor that `torch_name` calls `name`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def key_table(variables: Any, rules: Rules, part: str = "") -> list[Entry]:
    """The table of a model's variables (arrays or `jax.ShapeDtypeStruct`) in a format.

    With `part`, paths and keys are nested under that name, as in a network of backbone and head.
    """
    table = []
    for path, leaf in traverse_util.flatten_dict(variables).items():
        name = renamed(torch_name(path), rules)
        before, brace, rest = name.partition("{")
        choices, _, after = rest.partition("}")
        names = [f"{before}{choice}{after}" for choice in choices.split(",")] if brace else [name]
        shape = [leaf.shape[axis] for axis in _torch_axes(path, leaf.ndim)]
        shape[0] //= len(names)
        if part:
            path, names = (path[0], part, *path[1:]), [f"{part}.{name}" for name in names]
        table.append(Entry(path, tuple(names), tuple(shape)))
    return table


def _torch_axes(path: Sequence[str], ndim: int) -> tuple[int, ...]:
    """The parameter's axes in the order of the file's tensor."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (*range(ndim - 1, ndim - 3, -1), *range(ndim - 2))  # [in, out] -> [out, in]; [h, w, i, o] -> [o, i, h, w]


def from_torch(table: Sequence[Entry], tensors: Tensors, source: object) -> Variables:
    """Converts a file's tensors to variables, float32.

    Raises:
      UserError: lists missing, unexpected and misshaped keys, or keys with NaN or infinity.
    """
    expected = {key: entry.shape for entry in table for key in entry.keys}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected and not key.endswith(f".{COUNTER}")]
    shapes = {key: tuple(np.shape(tensors[key])) for key in expected if key in tensors}
    misshaped = [
        f"{key} is {list(shape)}, not {list(expected[key])}" for key, shape in shapes.items() if shape != expected[key]
    ]
    complaints = {"missing": missing, "unexpected": unexpected, "with a different shape": misshaped}
    if any(complaints.values()):
        lines = [f"{what}: {_listed(keys)}" for what, keys in complaints.items() if keys]
        raise UserError(f"{source}: the weights do not fit this model; {'; '.join(lines)}")
    if whole := [key for key in expected if np.asarray(tensors[key]).dtype.kind in "iubc"]:
        raise UserError(
            f"{source}: {_listed(whole)} of whole or complex numbers, such as quantized weights, which are not read"
        )
    if broken := [key for key in expected if not np.isfinite(np.asarray(tensors[key], np.float32)).all()]:
        raise UserError(f"{source}: NaN or infinity in {_listed(broken)}; use an earlier file")
    flat = {}
    for entry in table:
        joined = np.concatenate([np.asarray(tensors[key], np.float32) for key in entry.keys])
        inverse = np.argsort(_torch_axes(entry.path, joined.ndim))
        flat[entry.path] = np.ascontiguousarray(joined.transpose(inverse))
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)


def to_torch(table: Sequence[Entry], variables: Variables) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`, in the table's order; batch-norm counters are 0."""
    flat = traverse_util.flatten_dict(variables)
    tensors = {}
    for entry in table:
        leaf = np.asarray(jax.device_get(flat[entry.path]))
        joined = leaf.transpose(_torch_axes(entry.path, leaf.ndim))
        for key, part in zip(entry.keys, np.split(joined, len(entry.keys)), strict=True):
            tensors[key] = np.ascontiguousarray(part)
            if entry.path[-1] == "var":
                tensors[f"{key.removesuffix('running_var')}{COUNTER}"] = np.zeros((), np.int64)
    return tensors


def _listed(keys: Sequence[str], most: int = 20) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{', '.join(keys[:most])}{rest}"
