"""Starting a run from other weights (`init_from`), and importing weights as a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.data.storage import absolute, ensure_writable, write_atomically
from dino_jax.errors import UserError
from dino_jax.models.positions import resize_pos_embed
from dino_jax.training.step import TrainState, make_recipe, state_from_student, to_items
from dino_jax.weights import architecture, checkpoint, importer
from dino_jax.weights.importer import Moments, Restored
from dino_jax.weights.load import open_weights

HEADS = ("head", "patch_head")
MASK = "/mask_token"  # a backbone can begin and stop to have it
STEMS = ("patch_embed/kernel", "patch_embed/proj_0_0/kernel", "conv1/kernel")  # layers that see the image's channels


def start_from(state: TrainState, config: ConfigDict) -> tuple[TrainState, list[str]]:
    """Loads the weights of `config.init_from` (any CKPT) into `state`; also returns notes on what was done.

    The backbone is always loaded: a position table of another grid is resized as in the official code, and other
    channels keep the response to a gray image. The head and the objectives' states are loaded if the head matches
    `config.head`, else they stay fresh. Without a student in the CKPT, the student starts as a copy of the teacher.

    Raises:
      UserError: the backbone differs; the message lists the shapes that do not match.
    """
    heads = config.model.heads or architecture.MEMBERS[config.model.name].get("heads")
    weights = open_weights(config.init_from, heads=heads, everything=True)
    notes = [f"starting from {config.init_from}"]
    head, why = _same_head(weights, state)
    if why:
        notes.append(f"the head is fresh: {why}")
    teacher = _fitted(weights.teacher, state.teacher, weights, config, head, notes)
    source = weights.student if weights.student is not None and head else weights.teacher
    student = _fitted(source, state.student, weights, config, head, [])
    objectives = dict(state.objectives)
    for name, fresh in state.objectives.items() if head else ():
        theirs = weights.objectives.get(name, {})
        if fresh and _shapes(theirs) != _shapes(fresh):
            notes.append(f"the state of objective.{name} is fresh: this file has none that fits")
        else:
            objectives[name] = {key: _placed(theirs[key], like) for key, like in fresh.items()}
    if source is weights.teacher:
        notes.append("student and teacher start equal")
    state = state.replace(
        student=student,
        ema=state.ema._replace(teacher=teacher["params"]),
        teacher_stats=teacher["batch_stats"],
        objectives=objectives,
    )
    return state, notes


def _same_head(weights: Restored, state: TrainState) -> tuple[bool, str]:
    """Whether the CKPT's head fits, and if not why."""
    theirs, mine = (
        _flat({name: tree for name, tree in params.items() if name in HEADS})
        for params in (weights.teacher["params"], state.teacher["params"])
    )
    if not theirs:
        return False, "this file has none"
    differ = [
        f"{key.removeprefix('head/')} is {_shape(theirs.get(key))}, not {_shape(mine.get(key))}"
        for key in sorted(theirs.keys() | mine.keys())
        if _shape(theirs.get(key)) != _shape(mine.get(key))
    ]
    return not differ, f"config.head asks for another ({'; '.join(differ[:3])})"[: None if differ else 0]


def _fitted(
    source: Any, target: Any, weights: Restored, config: ConfigDict, head: bool, notes: list[str]
) -> dict[str, Any]:
    """`source`'s arrays with the shapes, dtypes and shardings of `target`; its head only with `head`."""
    have, want = _flat(source), _flat(target)
    fitted, misfits = {}, []
    for key, like in want.items():
        in_head = key.split("/")[1] in HEADS
        value = have.get(key)
        if (in_head and not head) or (value is None and key.endswith(MASK)):
            fitted[key] = like
            continue
        if value is not None and value.shape != like.shape:
            value = _adapted(key, value, like.shape, weights.config, config, notes)
        if value is None or value.shape != like.shape:
            misfits.append(f"{key} is {_shape(have.get(key))}, not {_shape(like)}")
        else:
            fitted[key] = _placed(value, like)
    misfits += [f"{key} is unknown here" for key in have if key not in want and not _optional(key)]
    if misfits:
        more, model = f" and {len(misfits) - 5} more" if len(misfits) > 5 else "", weights.config.model
        raise UserError(
            f"init_from={config.init_from}: its backbone is not config.model's: {', '.join(misfits[:5])}{more}; "
            f"set model.name={model.name}, model.patch_size={model.patch_size} and model.registers={model.registers}"
        )
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(fitted, sep="/")


def _optional(key: str) -> bool:
    """Whether weights may lack what this path leads to."""
    return key.split("/")[1] in HEADS or key.endswith(MASK)


def _adapted(
    key: str, value: np.ndarray, shape: tuple[int, ...], theirs: ConfigDict, mine: ConfigDict, notes: list[str]
) -> np.ndarray:
    """Adapts the position table to another grid and the first convolution to other channels, if that is enough."""
    if key.endswith("/pos_embed"):
        grids = [[size // c.model.patch_size for size in c.crops.global_size] for c in (theirs, mine)]
        how = mine.model.positions or "offset"
        if value.shape[-1] == shape[-1] and math.prod(grids[1]) + 1 == shape[1]:
            notes.append(f"the position table of {grids[0]} patches is resized to {grids[1]}")
            return np.asarray(resize_pos_embed(jnp.asarray(value), tuple(grids[1]), tuple(grids[0]), how))
    if key.endswith(STEMS) and value.shape[:2] == shape[:2] and value.shape[3] == shape[3]:
        before, after = value.shape[2], shape[2]
        notes.append(f"the first convolution's {before} channels become {after}: their mean, scaled")
        return np.repeat(value.mean(axis=2, keepdims=True) * (before / after), after, axis=2)
    return value


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _shape(leaf: Any) -> Any:
    return "absent" if leaf is None else list(leaf.shape)


def _shapes(tree: Any) -> dict[str, Any]:
    return {key: _shape(leaf) for key, leaf in _flat(tree).items()}


def _placed(value: Any, like: jax.Array) -> jax.Array:
    """`value` with the dtype and on the devices of `like`."""
    host = np.array(value, like.dtype)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def import_weights(
    file_or_name: epath.PathLike,
    out: epath.PathLike,
    **options: Any,
) -> epath.Path:
    """Writes the weights of a file or of a released model as the checkpoint folder `out`, and returns it.

    See `importer.read` for the options and errors.
    """
    _check_new(out)
    ensure_writable(out, f"--out={out}")
    return write_checkpoint(importer.read(file_or_name, **options), out)


def write_checkpoint(weights: Restored, out: epath.PathLike) -> epath.Path:
    """Writes `weights` as step 0 of a new workdir `out`, with its configuration; returns `out`.

    A whole network becomes a whole training state, with the file's optimizer moments or empty ones; a backbone alone
    becomes a teacher without a head.
    """
    _check_new(out)
    out = absolute(out)
    folder = out / "checkpoints"
    text = config_io.to_json(weights.config)
    with checkpoint.Checkpointer(folder, asynchronous=False) as checkpoints:
        checkpoints.save(0, _items(weights), text)
    write_atomically(out / "config.json", text)
    return out


def _check_new(out: epath.PathLike) -> None:
    if checkpoint.steps(absolute(out) / "checkpoints"):
        raise UserError(f"{out}: there are checkpoints here already; choose another --out")


def _items(weights: Restored) -> dict[str, Any]:
    if weights.student is None:
        return {"teacher": weights.teacher}
    recipe = make_recipe(weights.config, steps_per_epoch=1)
    state = state_from_student(recipe, weights.student)
    state = state.replace(
        ema=state.ema._replace(teacher=weights.teacher["params"]),
        teacher_stats=weights.teacher["batch_stats"],
        objectives={
            name: jax.tree.map(lambda like, x: np.asarray(x, like.dtype), fresh, weights.objectives.get(name, fresh))
            for name, fresh in state.objectives.items()
        },
        opt_state=state.opt_state if weights.moments is None else _fill(state.opt_state, weights.moments),
    )
    return to_items(state)


def _fill(opt_state: Any, moments: Moments) -> Any:
    """Fills an AdamW state with these moments; a count shared by several parameters is their largest."""

    def fill(path: Any, leaf: Any) -> Any:
        field, inside = _field(path)
        tree = getattr(moments, field)
        if field == "count":
            held = any(getattr(part, "key", None) == "last_layer" for part in path)
            params = tree["head"]["last_layer"] if held else {**tree, "head": tree["head"] | {"last_layer": {}}}
            return np.asarray(max(jax.tree.leaves(params)), leaf.dtype)
        for key in inside:
            tree = tree[key]
        return np.asarray(tree, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, opt_state)


def _field(path: Any) -> tuple[str, list[str]]:
    """Which field of `ScaleByAdamState` a leaf belongs to, and its path among the parameters."""
    places = [i for i, part in enumerate(path) if getattr(part, "name", None) in Moments._fields]
    return path[places[-1]].name, [part.key for part in path[places[-1] + 1 :]]
