"""Weight files in: the official release, timm, transformers, torchvision; as configuration and trees of parameters."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.objectives.objective import make_objectives
from dino_jax.weights import architecture, keys, names
from dino_jax.weights.containers import is_tensors, read_weights, regular_names, section

log = logging.getLogger(__name__)

# What a classifier's file holds besides the backbone, after `regular_names`; named in the log and left out.
CLASSIFIER = re.compile(r"backbone\.(fc|classifier|pooler|pooler\.dense|vit\.pooler\.dense)\.|head\.(weight|bias)$")
GAIN = "head.last_layer.weight_g"

# The official command line's words for our configuration keys.
ARGS = {
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "warmup_epochs": "optim.warmup_epochs",
    "weight_decay": "optim.weight_decay",
    "weight_decay_end": "optim.weight_decay_end",
    "clip_grad": "optim.clip_grad",
    "freeze_last_layer": "optim.freeze_last_layer",
    "optimizer": "optim.name",
    "momentum_teacher": "teacher.momentum",
    "teacher_temp": "teacher.temp",
    "warmup_teacher_temp": "teacher.warmup_temp",
    "warmup_teacher_temp_epochs": "teacher.warmup_temp_epochs",
    "global_crops_scale": "crops.global_scale",
    "local_crops_scale": "crops.local_scale",
    "local_crops_number": "crops.local_count",
    "drop_path_rate": "model.drop_path",
    "epochs": "epochs",
    "seed": "seed",
}


class Moments(NamedTuple):
    """AdamW's state by parameter: first and second moments, and the steps each parameter has made."""

    mu: Any  # params tree
    nu: Any  # params tree
    count: Any  # params tree of int32 scalars; the last layer's may be fewer (it was frozen)


class Weights(NamedTuple):
    """What a weight file holds, as this package has it. Trees are NumPy, float32."""

    config: ConfigDict
    teacher: keys.Variables  # params: backbone, and head if the file has one
    student: keys.Variables | None = None
    objectives: Mapping[str, Any] = {}  # the state of each objective term, by its name
    moments: Moments | None = None


def read(file_or_name: epath.PathLike, *, heads: int | None = None, from_file: epath.PathLike | None = None) -> Weights:
    """The weights in a file, or under a released model's name (downloaded once).

    Args:
      file_or_name: a `.pth` or `.safetensors` file, a transformers folder, or a key of `names.PRETRAINED`.
      heads: attention heads, for a width that no named model has.
      from_file: a local copy of what the name stands for; nothing is downloaded.

    Raises:
      UserError: in one line, whatever is wrong with the file, and which keys are missing, unexpected or misshaped.
    """
    if str(file_or_name) in names.PRETRAINED:
        path = epath.Path(from_file) if from_file else names.fetch(str(file_or_name))
    elif from_file:
        raise UserError(
            f"--from={from_file}: {file_or_name} is no released model's name; {names.known(str(file_or_name))}"
        )
    else:
        path = epath.Path(file_or_name)
        if not path.exists():
            raise UserError(f"{path}: no such file, nor a released model's name; {names.known(str(file_or_name))}")
    content = read_weights(path)
    if is_tensors(content):
        return _from_backbone(content, heads, path)
    if isinstance(content, Mapping):
        if "teacher" in content:
            return _from_checkpoint(content, heads, path)
        for key in ("state_dict", "model"):
            if is_tensors(content.get(key)):
                return _from_backbone(content[key], heads, path)
    raise UserError(f"{path}: no weights in it: neither named tensors nor a `teacher` that holds them")


def _from_backbone(tensors: keys.Tensors, heads: int | None, source: epath.Path) -> Weights:
    """A backbone alone, or a network's state dict without anything around it."""
    network = _regular(tensors)
    hints = _neighbor(source) if any("embeddings." in key for key in network) else architecture.Hints()
    return _weights(default(), network, hints._replace(heads=heads or hints.heads), source)


def _from_checkpoint(content: Mapping[str, Any], heads: int | None, source: epath.Path) -> Weights:
    """A full checkpoint of the official code."""
    config, args = default(), _arguments(content.get("args"))
    student, optimizer = content.get("student"), content.get("optimizer")
    for key, value in (("teacher", content["teacher"]), ("student", student)):
        if not is_tensors(value) and (key == "teacher" or value is not None):
            raise UserError(f"{source}: its {key!r} is no dict of tensors")
    _fill_recipe(config, args)
    network = _regular(content["teacher"])
    student = _regular(student) if student else None
    train_gain = args.get("norm_last_layer") is False or _gain_has_moments(student, optimizer)
    hints = _hints(heads or args.get("num_heads"), args.get("image_size"))  # which our own exports have
    weights = _weights(config, network, hints, source, student, train_gain)
    moments = None
    if student is not None and optimizer:
        try:
            moments = _moments(config, student, optimizer, source)
        except (UserError, KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("%s: the optimizer's state does not map (%s) and is left out", source, error)
    return weights._replace(objectives=_objectives(config, content, source), moments=moments)


def _objectives(config: ConfigDict, content: Mapping[str, Any], source: epath.Path) -> dict[str, Any]:
    """The states of the terms that the file has all arrays of, by the term's name."""
    states = {}
    for term in make_objectives(config):
        shapes = jax.eval_shape(term.init)
        found = {name: _at(content, place.path) for name, place in term.official.items()}
        if not found or any(value is None for value in found.values()):
            continue
        for name, value in found.items():
            array, size = np.asarray(value, np.float32), math.prod(shapes[name].shape)
            if array.size != size or not np.isfinite(array).all():
                raise UserError(
                    f"{source}: its {term.official[name].path} has {array.size} values where config.head asks for "
                    f"{size}, or NaN among them"
                )
            found[name] = array.reshape(shapes[name].shape)
        states[term.name] = found
    return states


def _at(content: Any, path: str) -> Any:
    """What nested mappings hold at a dotted path, or None."""
    for part in path.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _regular(tensors: keys.Tensors) -> dict[str, np.ndarray]:
    regular = regular_names({key.removeprefix("vit."): value for key, value in tensors.items()})
    classifier = [key for key in regular if CLASSIFIER.match(key)]
    if classifier:
        log.info("left out, no part of the backbone: %s", ", ".join(classifier))
    return {key: value for key, value in regular.items() if key not in classifier}


def _weights(
    config: ConfigDict,
    network: dict[str, np.ndarray],
    hints: architecture.Hints,
    source: epath.Path,
    student: dict[str, np.ndarray] | None = None,
    train_gain: bool = False,
) -> Weights:
    """Fills the configuration from the shapes and maps teacher and student through its table."""
    backbone, head = section(network, "backbone."), section(network, "head.")
    fmt = architecture.recognise(backbone, source)
    architecture.fill_model(config, fmt, backbone, hints, source)
    both = [state for state in (network, student) if state is not None]
    if head:
        train_gain |= any(np.any(state.get(GAIN, 1) != 1) for state in both)
        architecture.fill_head(config, head, train_gain, source)
    table = architecture.network_table(config, fmt.rules, bool(head))
    trees = [keys.from_torch(table, _without_gain(state, train_gain), source) for state in both]
    return Weights(config, trees[0], trees[1] if student is not None else None)


def _without_gain(state: dict[str, np.ndarray], train_gain: bool) -> dict[str, np.ndarray]:
    """A gain that is not trained is 1 and no parameter here."""
    return {key: value for key, value in state.items() if train_gain or key != GAIN}


def _arguments(args: Any) -> dict[str, Any]:
    """The official code's `args`: a Namespace there, a dict in our own exports."""
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def _fill_recipe(config: ConfigDict, args: dict[str, Any]) -> None:
    """The configuration keys that the official arguments name; a value of another type is passed over."""
    wanted = {key: args[word] for word, key in ARGS.items() if args.get(word) is not None}
    if args.get("batch_size_per_gpu") and args.get("world_size"):
        wanted["batch_size"] = args["batch_size_per_gpu"] * args["world_size"]
    for key, value in wanted.items():
        group, _, name = key.rpartition(".")
        owner = config[group] if group else config
        value = tuple(value) if isinstance(value, list) else value
        try:
            owner[name] = type(owner[name])(value) if isinstance(owner[name], (int, float)) else value
        except (TypeError, ValueError):
            log.info("the checkpoint's args: %s=%r does not fit %s, which keeps its default", key, value, key)


def _trained(student: dict[str, np.ndarray], optimizer: Any) -> dict[int, str]:
    """The parameter behind each of the optimizer's indices: the official groups, in the order of the state dict.

    Official: `utils.get_params_groups`, biases and 1-D tensors last. Raises if the counts do not agree.
    """
    buffers = ("running_mean", "running_var", keys.COUNTER)
    everything = [key for key in student if not key.endswith(buffers)]
    groups = [group["params"] for group in optimizer["param_groups"]]
    for trained in (everything, [key for key in everything if key != GAIN]):
        flat = [key for key in trained if key.endswith(".bias") or student[key].ndim == 1]
        ordered = [key for key in trained if key not in set(flat)], flat
        if [len(group) for group in groups] == [len(part) for part in ordered]:
            pairs = zip(groups, ordered, strict=True)
            return {index: key for group, part in pairs for index, key in zip(group, part, strict=True)}
    raise ValueError("it is of other parameters")


def _gain_has_moments(student: dict[str, np.ndarray] | None, optimizer: Any) -> bool:
    try:
        return GAIN in _trained(student or {}, optimizer).values()
    except (KeyError, TypeError, ValueError):  # no optimizer's state, or one that does not map
        return False


def _moments(config: ConfigDict, student: dict[str, np.ndarray], optimizer: Any, source: epath.Path) -> Moments:
    """AdamW's state as trees; a parameter that was never updated has zeros. Raises if it is not AdamW's."""
    index_of = {key: index for index, key in _trained(student, optimizer).items()}
    fmt = architecture.recognise(section(student, "backbone."), source)
    table = architecture.network_table(config, fmt.rules, with_head=True)
    table = [entry for entry in table if entry.path[0] == "params"]

    def tree(field: str) -> Any:
        def value(key: str) -> np.ndarray:
            entry = optimizer["state"].get(index_of[key])
            shape = student[key].shape
            return np.zeros(shape, np.float32) if entry is None else np.broadcast_to(entry[field], shape)

        return keys.from_torch(table, {key: value(key) for key in index_of}, f"{source} (optimizer)")["params"]

    count = jax.tree.map(lambda x: np.int32(x.flat[0]), tree("step"))
    return Moments(tree("exp_avg"), tree("exp_avg_sq"), count)


def _neighbor(source: epath.Path) -> architecture.Hints:
    """What a transformers `config.json` beside the weights tells."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    try:
        described = json.loads(path.read_text())
        return _hints(described.get("num_attention_heads"), described.get("image_size"))
    except (OSError, ValueError, AttributeError):
        return architecture.Hints()


def _hints(heads: Any, size: Any) -> architecture.Hints:
    """Hints from a file's words, which may be anything."""
    size = (size, size) if isinstance(size, int) else size
    is_size = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    is_heads = isinstance(heads, int) and heads > 0
    return architecture.Hints(heads if is_heads else None, tuple(size) if is_size else None)
