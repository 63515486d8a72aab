"""Key tables: which tensor of a weight file is which parameter here, read in both directions.

A table is made from the shapes of a model's variables and the naming rules of one format, so every key and every shape
is known before a file is opened: a file fits exactly, or the error lists what does not. Torch keeps linear weights as
[out, in] and convolutions as [out, in, h, w]; Flax as [in, out] and [h, w, in, out].
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
LEAVES |= {"v": "weight_v", "g": "weight_g"}  # of torch's weight_norm
COUNTER = "num_batches_tracked"  # torch counts batch norm's batches and, with a fixed momentum, never looks

# What the format calls what torch_name() would call otherwise: (pattern, replacement), applied in order.
# Braces stand for several tensors of the file that are one parameter here, joined along the first axis.
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
HUGGING_FACE_5 = (  # the names in memory since transformers 5; save_pretrained still writes the ones above
    *HUGGING_FACE[:3],
    (r"\.attn\.qkv\.", ".attention.{q,k,v}_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    *HUGGING_FACE[5:7],
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "layers."),
)


class Entry(NamedTuple):
    """One parameter: its path in the variables, the file's names for it, and the shape of each in the file."""

    path: tuple[str, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]


def torch_name(path: Sequence[str]) -> str:
    """`(params, blocks_0, attn, qkv, kernel)` -> `blocks.0.attn.qkv.weight`."""
    *modules, leaf = path[1:]
    parts = [re.sub(r"_(?=\d)", ".", module) for module in modules]
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


def renamed(name: str, rules: Rules) -> str:
    """What a format calls the tensor that `torch_name` calls `name`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def key_table(variables: Any, rules: Rules, part: str = "") -> list[Entry]:
    """The table of a model's variables (arrays or `jax.ShapeDtypeStruct`) in a format.

    With `part`, of a network whose `part` the model is: its paths and its keys stand under that name.
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
    """Which axes of the parameter here are the axes of the tensor in the file."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (*range(ndim - 1, ndim - 3, -1), *range(ndim - 2))  # [in, out] -> [out, in]; [h, w, i, o] -> [o, i, h, w]


def from_torch(table: Sequence[Entry], tensors: Tensors, source: object) -> Variables:
    """The variables, float32, from a file's tensors.

    Raises:
      UserError: names every missing, unexpected and misshaped key, or every key that holds NaN or infinity.
    """
    expected = {key: entry.shape for entry in table for key in entry.keys}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected and not key.endswith(f".{COUNTER}")]
    shapes = {key: tuple(np.shape(tensors[key])) for key in expected if key in tensors}
    misshaped = [
        f"{key} is {list(shape)}, not {list(expected[key])}" for key, shape in shapes.items() if shape != expected[key]
    ]
    complaints = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(complaints.values()):
        lines = [f"{what}: {_listed(keys)}" for what, keys in complaints.items() if keys]
        raise UserError(f"{source}: the weights do not fit this model; {'; '.join(lines)}")
    if broken := [key for key in expected if not np.isfinite(np.asarray(tensors[key], np.float32)).all()]:
        raise UserError(f"{source}: NaN or infinity in {_listed(broken)}; use an earlier file")
    flat = {}
    for entry in table:
        joined = np.concatenate([np.asarray(tensors[key], np.float32) for key in entry.keys])
        inverse = np.argsort(_torch_axes(entry.path, joined.ndim))
        flat[entry.path] = np.ascontiguousarray(joined.transpose(inverse))
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)


def to_torch(table: Sequence[Entry], variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, in the table's order; batch norm's counters are 0."""
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
