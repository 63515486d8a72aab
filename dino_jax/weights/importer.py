"""Imports weight files (official release, timm, transformers, torchvision) as configuration and parameter trees."""

from __future__ import annotations

import argparse
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
from dino_jax.data.storage import cause, read_json
from dino_jax.errors import UserError, printable
from dino_jax.objectives.objective import make_objectives
from dino_jax.weights import architecture, foreign, keys, names, networks
from dino_jax.weights.containers import is_tensors, metadata, read_weights
from dino_jax.weights.networks import section

log = logging.getLogger(__name__)

# A classifier's keys outside the backbone, after `regular_names`; logged and skipped.
CLASSIFIER = re.compile(r"backbone\.(fc|classifier|pooler|pooler\.dense|vit\.pooler\.dense)\.|head\.(weight|bias)$")
IMAGE_SIZE = "dino_jax.image_size"  # height and width, in the metadata of timm exports
GAIN = "head.last_layer.weight_g"

# Official command-line argument -> our configuration key.
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
    """AdamW's state: first and second moments, and update counts, by parameter."""

    mu: Any  # params tree
    nu: Any  # params tree
    count: Any  # params tree of int32 scalars; lower for the last layer if it was frozen


class Restored(NamedTuple):
    """A weight file converted to this package's form. Trees are NumPy, float32."""

    config: ConfigDict
    teacher: keys.Variables  # params: backbone, and head if the file has one
    student: keys.Variables | None = None
    objectives: Mapping[str, Any] = {}  # state by objective term
    moments: Moments | None = None


def read(
    file_or_name: epath.PathLike,
    *,
    heads: int | None = None,
    from_file: epath.PathLike | None = None,
    key: str | None = None,
    prefix: str | None = None,
    grid: tuple[int, int] | None = None,
) -> Restored:
    """The weights in a file, or under a released model's name (downloaded once).

    Args:
      file_or_name: a `.pth` or `.safetensors` file, an index of shards, a transformers folder, or a key of
        `names.PRETRAINED`.
      heads: attention heads, if no named model has this width.
      from_file: a local copy of the named file, instead of a download.
      key: dotted path of the state dict in the file, such as `model_ema`, if there are several.
      prefix: what the names of the backbone's tensors begin with; the backbone is then read alone.
      grid: rows and columns of a ViT's position table, if it is not square and the file does not say.

    Raises:
      UserError: one line with the problem, including any missing, unexpected or misshaped keys.
    """
    if str(file_or_name) in names.PRETRAINED:
        path = epath.Path(from_file) if from_file else names.fetch(str(file_or_name))
    elif from_file:
        raise UserError(f"--from={from_file}: {file_or_name} is not a released model; {names.known(str(file_or_name))}")
    else:
        path = epath.Path(file_or_name)
        if not path.exists():
            raise UserError(f"{path}: no such file or released model; {names.known(str(file_or_name))}")
    if heads is not None and heads < 1:
        raise UserError(f"--heads={heads}: a model has at least one attention head")
    content = read_weights(path)
    given = architecture.Hints(heads, grid=grid)
    if key is None and prefix is None and isinstance(content, Mapping) and "teacher" in content:
        return _from_checkpoint(content, given, path)
    network = _regular(networks.find(content, key, prefix, path).tensors(alone=prefix is not None))
    said = _neighbor(path) if any("embeddings." in key for key in network) else _own(path)
    if grid and said.image_size:
        log.warning("%s: --grid is used, not the image size of %s that the file says", path, list(said.image_size))
    return _weights(default(), network, said._replace(heads=heads or said.heads, grid=grid), path)


def _from_checkpoint(content: Mapping[str, Any], given: architecture.Hints, source: epath.Path) -> Restored:
    """From a full checkpoint of the official code."""
    config, args = default(), _arguments(content.get("args"))
    student, optimizer = content.get("student"), content.get("optimizer")
    for key, value in (("teacher", content["teacher"]), ("student", student)):
        if not is_tensors(value) and (key == "teacher" or value is not None):
            raise UserError(f"{source}: {key!r} is not a dict of tensors")
    _fill_recipe(config, args)
    found = networks.find(content, None, None, source)
    found = found if found.key == "teacher" else networks.find(content, "teacher", None, source)
    network = _regular(found.tensors())
    student = _regular(networks.find(student, None, None, f"{source}: student").tensors()) if student else None
    train_gain = args.get("norm_last_layer") is False or _gain_has_moments(student, optimizer)
    said = args.get("num_heads"), args.get("image_size")  # our own exports have them
    hints = _hints(given.heads or said[0], said[1], f"{source}: args")
    hints = hints._replace(grid=given.grid)
    weights = _weights(config, network, hints, source, student, train_gain)
    moments = None
    if student is not None and optimizer:
        try:
            moments = _moments(config, student, optimizer, source)
        except Exception as error:  # values of any kind
            reason = printable(cause(error))
            log.warning("%s: the optimizer's state does not match (%s) and is skipped", source, reason)
    return weights._replace(objectives=_objectives(config, content, source), moments=moments)


def _objectives(config: ConfigDict, content: Mapping[str, Any], source: epath.Path) -> dict[str, Any]:
    """States by term, for the terms whose arrays are all in the file."""
    states = {}
    for term in make_objectives(config):
        shapes = jax.eval_shape(term.init)
        found = {name: networks.at(content, place.path) for name, place in term.official.items()}
        if not found or any(value is None for value in found.values()):
            continue
        for name, value in found.items():
            array, size = _numbers(value), math.prod(shapes[name].shape)
            if array.size != size or not np.isfinite(array).all():
                raise UserError(
                    f"{source}: {term.official[name].path} must have {size} finite values for config.head; it has "
                    f"{array.size}, or NaN or infinity among them"
                )
            found[name] = array.reshape(shapes[name].shape)
        states[term.name] = found
    return states


def _numbers(value: Any) -> np.ndarray:
    """An array or number as float32; empty for anything else, such as nested lists, which could be endless."""
    known = isinstance(value, (np.ndarray, np.number, float)) or (type(value) is int and abs(value) < 1 << 60)
    return np.asarray(value if known else [], np.float32)


def _regular(tensors: keys.Tensors) -> dict[str, np.ndarray]:
    classifier = {key: value for key, value in tensors.items() if CLASSIFIER.match(key)}
    if classifier:
        log.info("skipped, not part of the backbone: %s (a classifier)", ", ".join(classifier))
    return {key: value for key, value in tensors.items() if key not in classifier}


def _weights(
    config: ConfigDict,
    network: dict[str, np.ndarray],
    hints: architecture.Hints,
    source: epath.Path,
    student: dict[str, np.ndarray] | None = None,
    train_gain: bool = False,
) -> Restored:
    """Fills the configuration from the shapes and converts teacher and student."""
    try:
        return _converted(config, network, hints, source, student, train_gain)
    except UserError as error:
        name, reason = foreign.name_of(network), str(error).removeprefix(f"{source}: ")
        what = f"these look like {name}; {foreign.READ} ({reason})" if name else reason
        raise UserError(f"{source}: {what}") from None


def _converted(
    config: ConfigDict,
    network: dict[str, np.ndarray],
    hints: architecture.Hints,
    source: epath.Path,
    student: dict[str, np.ndarray] | None,
    train_gain: bool,
) -> Restored:
    if empty := [key for key, value in network.items() if value.size == 0]:
        raise UserError(f"{source}: {empty[0]} is empty: damaged, or one part of weights in several files")
    backbone, head = section(network, "backbone."), section(network, "head.")
    fmt = architecture.recognize(backbone, source)
    architecture.fill_model(config, fmt, backbone, hints, source)
    both = [state for state in (network, student) if state is not None]
    if head:
        train_gain |= any(np.any(state.get(GAIN, 1) != 1) for state in both)
        architecture.fill_head(config, head, train_gain, source)
    table = architecture.network_table(config, fmt.rules, bool(head))
    trees = [keys.from_torch(table, _without_gain(state, train_gain), source) for state in both]
    return Restored(config, trees[0], trees[1] if student is not None else None)


def _without_gain(state: dict[str, np.ndarray], train_gain: bool) -> dict[str, np.ndarray]:
    """Drops an untrained gain, which is 1 and not a parameter here."""
    return {key: value for key, value in state.items() if train_gain or key != GAIN}


def _arguments(args: Any) -> dict[str, Any]:
    """The numbers, words and short lists of a checkpoint's `args`: a Namespace in official files, a dict in ours."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args

    def simple(value: Any) -> bool:
        return isinstance(value, (bool, float, np.integer, np.floating)) or (
            isinstance(value, (int, str)) and len(str(value) if isinstance(value, str) else bin(value)) < 100
        )

    return {
        key: value
        for key, value in (args.items() if isinstance(args, Mapping) else ())
        if simple(value) or (isinstance(value, (list, tuple)) and len(value) < 10 and all(map(simple, value)))
    }


def _fill_recipe(config: ConfigDict, args: dict[str, Any]) -> None:
    """Sets configuration keys from the official arguments; values of the wrong type are skipped."""
    wanted = {key: args[word] for word, key in ARGS.items() if args.get(word) is not None}
    sizes = args.get("batch_size_per_gpu"), args.get("world_size")
    if all(type(size) is int and size > 0 for size in sizes):
        wanted["batch_size"] = math.prod(sizes)
    for key, value in wanted.items():
        group, _, name = key.rpartition(".")
        owner = config[group] if group else config
        value = tuple(value) if isinstance(value, list) else value
        try:
            owner[name] = type(owner[name])(value) if isinstance(owner[name], (int, float)) else value
        except (TypeError, ValueError, OverflowError):
            log.info("the checkpoint's args: %s=%r does not fit %s, which keeps its default", key, value, key)


def _trained(student: dict[str, np.ndarray], optimizer: Any) -> dict[int, str]:
    """Optimizer index -> parameter name, by the official groups in state-dict order.

    Official: `utils.get_params_groups`, biases and 1-D tensors last. Raises ValueError if the counts differ.
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
    raise ValueError("it is for other parameters")


def _gain_has_moments(student: dict[str, np.ndarray] | None, optimizer: Any) -> bool:
    try:
        return GAIN in _trained(student or {}, optimizer).values()
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ):  # no optimizer state, or one that does not match
        return False


def _moments(config: ConfigDict, student: dict[str, np.ndarray], optimizer: Any, source: epath.Path) -> Moments:
    """AdamW's state as trees; zeros for parameters never updated. Raises if it is not AdamW's."""
    index_of = {key: index for index, key in _trained(student, optimizer).items()}
    fmt = architecture.recognize(section(student, "backbone."), source)
    table = architecture.network_table(config, fmt.rules, with_head=True)
    table = [entry for entry in table if entry.path[0] == "params"]

    def tree(field: str) -> Any:
        def value(key: str) -> np.ndarray:
            entry = optimizer["state"].get(index_of[key])
            shape = student[key].shape
            return np.zeros(shape, np.float32) if entry is None else np.broadcast_to(_numbers(entry[field]), shape)

        return keys.from_torch(table, {key: value(key) for key in index_of}, f"{source} (optimizer)")["params"]

    count = jax.tree.map(lambda x: np.int32(x.flat[0]), tree("step"))
    return Moments(tree("exp_avg"), tree("exp_avg_sq"), count)


def _neighbor(source: epath.Path) -> architecture.Hints:
    """Hints from a transformers `config.json` next to the weights."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.exists():
        return architecture.Hints()
    described = read_json(path)
    return _hints(described.get("num_attention_heads"), described.get("image_size"), path)


def _own(source: epath.Path) -> architecture.Hints:
    """Hints that our own timm export leaves in a safetensors file."""
    size = metadata(source).get(IMAGE_SIZE)
    return _hints(None, None if size is None else [int(n) for n in re.findall(r"\d{1,6}", str(size))], source)


def _hints(heads: Any, size: Any, source: object) -> architecture.Hints:
    """Hints from a file's values.

    Raises:
      UserError: they are not numbers of heads and pixels.
    """
    size = (size, size) if type(size) is int else size
    is_size = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if size is not None and not is_size:
        raise UserError(f"{source}: its image size is not one or two positive whole numbers")
    if heads is not None and not (type(heads) is int and heads > 0):
        raise UserError(f"{source}: its number of attention heads is not a positive whole number")
    return architecture.Hints(heads, None if size is None else (size[0], size[1]))
