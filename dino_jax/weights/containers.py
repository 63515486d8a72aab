"""Reads weight files of every kind as dicts of tensors, and unifies the official checkpoints' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dino_jax.errors import UserError
from dino_jax.weights.pth import read_pth

# Names from other versions of the official code and of torch: (pattern, replacement), applied in order.
RENAMED = (
    (r"^(module\.|_orig_mod\.)+", ""),  # DistributedDataParallel, torch.compile
    (r"\bprojection_head\.", "mlp."),  # the first release
    (r"\bprototypes\.", "last_layer."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),  # weight_norm since torch 2.0
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^(mlp|last_layer)\.", r"head.\1."),
)


def read_weights(path: epath.PathLike) -> Any:
    """The contents of a `.pth` or `.safetensors` file (detected by content), or a folder with `model.safetensors`.

    Raises:
      UserError: missing, truncated, hostile or not a weight file.
    """
    path = epath.Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            raise UserError(
                f"{path.parent}: no model.safetensors in this folder; to use a run, give its folder as --checkpoint"
            )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    if not (start[8:] == b"{" or path.suffix == ".safetensors"):
        return read_pth(path)
    try:
        return safetensors.numpy.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: truncated or not a safetensors file ({reason}); download it again") from None


def is_tensors(value: Any) -> bool:
    """Whether a value is a state dict: only names mapped to arrays."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(item, np.ndarray) for key, item in value.items())
    )


def regular_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict with current names: `backbone.*`, `head.mlp.*`, `head.last_layer.weight_[gv]`.

    A last layer without weight norm (the released ResNet-50's) is converted to an equivalent direction and gain, and
    timm's registers and positions are converted back: see `timm_prefix`.
    """
    regular = {}
    for key, value in state.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        regular[key if key.startswith(("backbone.", "head.")) else f"backbone.{key}"] = value
    if (plain := regular.pop("head.last_layer.weight", None)) is not None:
        regular["head.last_layer.weight_v"] = plain
        regular["head.last_layer.weight_g"] = np.linalg.norm(plain.astype(np.float32), axis=1, keepdims=True)
    if (registers := regular.pop("backbone.reg_token", None)) is not None:
        regular["backbone.register_tokens"] = registers
        if (table := regular.get("backbone.pos_embed")) is not None:  # timm has no row for CLS: add zeros
            regular["backbone.pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    return regular


def timm_prefix(backbone: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts a ViT with registers to timm's tensors (`reg_tokens`, `no_embed_class`); others are unchanged.

    timm calls `register_tokens` `reg_token`, and adds the position of CLS to `cls_token` instead of keeping its row.
    """
    if "register_tokens" not in backbone:
        return dict(backbone)
    table = backbone["pos_embed"]  # [1, 1 + N, D]
    changed = {"cls_token": backbone["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
    return {"reg_token" if key == "register_tokens" else key: changed.get(key, x) for key, x in backbone.items()}


def section(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names start with `prefix`, which is removed."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
