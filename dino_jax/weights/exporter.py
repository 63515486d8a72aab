"""Exports checkpoints: torch weights for the official code, timm and transformers; StableHLO and ONNX programs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from dino_jax.data.storage import absolute, ensure_new_file, write_atomically
from dino_jax.errors import UserError
from dino_jax.models import build_backbone
from dino_jax.objectives.objective import make_objectives
from dino_jax.weights import architecture, checkpoint, keys, programs
from dino_jax.weights.importer import ARGS, GAIN, IMAGE_SIZE, Restored
from dino_jax.weights.load import open_weights
from dino_jax.weights.networks import timm_prefix
from dino_jax.weights.pth import write_pth

Tensors = dict[str, np.ndarray]


def export_weights(
    ckpt: epath.PathLike,
    out: epath.PathLike,
    *,
    format: str,
    heads: int | None = None,
    attention: bool = False,
    image_size: tuple[int, int] | None = None,
) -> epath.Path:
    """Writes a CKPT's weights in another library's format and returns the file.

    Args:
      ckpt: what `open_weights` takes.
      out: a file with the format's suffix, or a folder for a file with the usual name.
      format: `official` (.pth: a full checkpoint if the CKPT has a head, else the backbone), `timm` or `hf`
        (.safetensors; hf adds its config.json), `stablehlo` or `onnx` (the backbone as a program).
      heads: attention heads, if a weight file does not determine them.
      attention: programs also return the last block's attention.
      image_size: (height, width) of a program's input; None: the configuration's global crops.

    Raises:
      UserError: unknown format, model unsupported by the format, or converter not installed.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}: choose one of {', '.join(FORMATS)}")
    name, write = FORMATS[format]
    out = absolute(out)
    suffixes = (".pth", ".safetensors") if format == "timm" else (epath.Path(name).suffix,)
    if out.suffix in (".pth", ".safetensors", ".stablehlo", ".onnx") and out.suffix not in suffixes:
        raise UserError(f"--out={out}: --format={format} writes {' or '.join(suffixes)}: give such a file or a folder")
    path = out if out.suffix in suffixes else out / name
    workdir = (path.parent / "checkpoints").exists()  # one file may lie in it; hf writes config.json, too
    if checkpoint.belongs_to_run(path.parent) and (not workdir or path != out or format == "hf"):
        raise UserError(f"--out={out}: this is the folder of a run, whose files must stay: choose another")
    ensure_new_file(path, f"--out={out}")
    weights = open_weights(ckpt, heads=heads, everything=format == "official")
    write(weights, path, attention=attention, image_size=image_size or weights.config.crops.global_size)
    return path


def official(weights: Restored) -> dict[str, Any]:
    """An official checkpoint: `student`, `teacher`, `args`, and the objectives' states.

    For a backbone without head: its state dict.
    """
    if "head" not in weights.teacher["params"]:
        return backbone_tensors(weights, "official")
    teacher = _network(weights, weights.teacher)
    distributed = any(key.endswith(keys.COUNTER) for key in teacher)  # with batch norm the teacher is wrapped too
    content: dict[str, Any] = {"teacher": _prefixed(teacher, "module.") if distributed else teacher}
    if weights.student is not None:
        content["student"] = _prefixed(_network(weights, weights.student), "module.")
    for term in make_objectives(weights.config):
        for name, place in term.official.items() if term.name in weights.objectives else ():
            *groups, last = place.path.split(".")
            owner = functools.reduce(lambda tree, group: tree.setdefault(group, {}), groups, content)
            owner[last] = np.asarray(weights.objectives[term.name][name]).reshape(place.shape)
    return {**content, "args": _arguments(weights)}


def backbone_tensors(weights: Restored, name: str) -> Tensors:
    """The teacher's backbone under `official`, `timm` or `hf` names; `UserError` if the format lacks the model."""
    rules = architecture.rules(weights.config, name)
    table = keys.key_table(architecture.backbone_shapes(weights.config), rules)
    tensors = keys.to_torch(table, part(weights.teacher, "backbone"))
    return timm_prefix(tensors) if name == "timm" else tensors


def part(variables: keys.Variables, name: str) -> keys.Variables:
    """The variables of a network's `backbone` or `head`, by collection."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def _network(weights: Restored, variables: keys.Variables) -> Tensors:
    """The state dict of backbone and head; an untrained gain is 1."""
    rules = architecture.rules(weights.config, "official")
    tensors = keys.to_torch(architecture.network_table(weights.config, rules, with_head=True), variables)
    if GAIN not in tensors:
        tensors[GAIN] = np.ones((weights.config.head.out_dim, 1), np.float32)
    return tensors


def _prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def _arguments(weights: Restored) -> dict[str, Any]:
    """The official `args`, as a plain dict: `torch.load(weights_only=True)` refuses a Namespace."""
    config = weights.config
    args: dict[str, Any] = {}
    for word, key in ARGS.items():
        group, _, name = key.rpartition(".")
        args[word] = (config[group] if group else config)[name]
    args["image_size"] = list(config.crops.global_size)  # this and num_heads are ours, for re-importing
    backbone = build_backbone(config.model, config.crops.global_size)
    if backbone.patch_size:
        args["num_heads"] = backbone.heads
    args |= {"arch": config.model.name, "patch_size": config.model.patch_size, "out_dim": config.head.out_dim}
    return args | {"norm_last_layer": config.head.norm_last_layer, "use_bn_in_head": config.head.use_bn}


def _write_official(weights: Restored, path: epath.Path, **_: Any) -> None:
    write_pth(path, official(weights))


def _write_timm(weights: Restored, path: epath.Path, **_: Any) -> None:
    tensors = backbone_tensors(weights, "timm")
    if path.suffix == ".pth":
        write_pth(path, tensors)
    else:
        size = ",".join(map(str, weights.config.crops.global_size))
        write_atomically(path, safetensors.numpy.save(tensors, metadata={"format": "pt", IMAGE_SIZE: size}))


def _write_hf(weights: Restored, path: epath.Path, **_: Any) -> None:
    write_atomically(path, safetensors.numpy.save(backbone_tensors(weights, "hf"), metadata={"format": "pt"}))
    config, (height, width) = weights.config, weights.config.crops.global_size
    backbone = build_backbone(config.model, (height, width))
    description = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.embed_dim,
        "intermediate_size": 4 * backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "num_channels": config.model.in_chans,
        "patch_size": config.model.patch_size,
        "image_size": height if height == width else [height, width],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # transformers defaults to 1e-12
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    write_atomically(path.parent / "config.json", json.dumps(description, indent=2))


def _write_stablehlo(weights: Restored, path: epath.Path, **options: Any) -> None:
    write_atomically(path, programs.stablehlo(*_backbone(weights), channels=weights.config.model.in_chans, **options))


def _write_onnx(weights: Restored, path: epath.Path, **options: Any) -> None:
    write_atomically(path, programs.onnx(*_backbone(weights), channels=weights.config.model.in_chans, **options))


def _backbone(weights: Restored) -> tuple[Any, keys.Variables]:
    return build_backbone(weights.config.model, weights.config.crops.global_size), part(weights.teacher, "backbone")


FORMATS: dict[str, tuple[str, Callable[..., None]]] = {  # name -> the file's usual name, its writer
    "official": ("checkpoint.pth", _write_official),
    "timm": ("model.safetensors", _write_timm),
    "hf": ("model.safetensors", _write_hf),
    "stablehlo": ("model.stablehlo", _write_stablehlo),
    "onnx": ("model.onnx", _write_onnx),
}
