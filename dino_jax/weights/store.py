"""Weights as checkpoint folders, and any CKPT as weights: the one door to evaluate, export or start from."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from dino_jax import checkpoint, config_io
from dino_jax.errors import UserError
from dino_jax.train_step import make_recipe, state_from_student, to_items
from dino_jax.weights import importer, names
from dino_jax.weights.importer import Moments, Weights


def open_weights(ckpt: epath.PathLike, *, heads: int | None = None, everything: bool = False) -> Weights:
    """The weights of a CKPT: a workdir, one step's folder, an imported folder, a weight file, a released model's name.

    Args:
      ckpt: local or gs:// path, or a key of `names.PRETRAINED`.
      heads: attention heads, where a weight file does not tell.
      everything: student and centre too, if they are there; else the teacher alone is read.

    Raises:
      UserError: in one line, what is wrong with it.
    """
    path = epath.Path(ckpt)
    is_folder = path.is_dir() and not (path / "model.safetensors").exists()
    if str(ckpt) in names.PRETRAINED or not is_folder:
        return importer.read(ckpt, heads=heads)
    directory, step = checkpoint.resolve(path)
    config = config_io.from_json(checkpoint.restore_config(directory, step))
    here = {item.name for item in (directory / str(step)).iterdir()}
    items = ["teacher", *(["student", "rest"] if everything and "student" in here else [])]
    abstract = {item: checkpoint.abstract(directory, step, item) for item in items}
    restored = checkpoint.restore(directory, step, abstract)
    center = restored["rest"]["center"] if "rest" in restored else None
    student = _variables(restored["student"]) if "student" in restored else None
    return Weights(config, _variables(restored["teacher"]), student, center)


def import_weights(
    file_or_name: epath.PathLike,
    out: epath.PathLike,
    *,
    heads: int | None = None,
    from_file: epath.PathLike | None = None,
) -> epath.Path:
    """Writes the weights of a file or of a released model as the checkpoint folder `out`, and returns it.

    See `importer.read` for the arguments and errors.
    """
    return write_checkpoint(importer.read(file_or_name, heads=heads, from_file=from_file), out)


def write_checkpoint(weights: Weights, out: epath.PathLike) -> epath.Path:
    """Writes `weights` as step 0 of a new workdir `out`, with the configuration beside it; returns `out`.

    A whole network becomes a whole training state, its optimiser at the file's moments or at none; a backbone alone is
    a teacher without a head.
    """
    out = epath.Path(out).expanduser()
    folder = out / "checkpoints"
    if checkpoint.steps(folder):
        raise UserError(f"{out}: there are checkpoints here already; choose another --out")
    text = config_io.to_json(weights.config)
    with checkpoint.Checkpointer(folder, asynchronous=False) as checkpoints:
        checkpoints.save(0, _items(weights), text)
    (out / "config.json").write_text(text)
    return out


def _items(weights: Weights) -> dict[str, Any]:
    if weights.student is None:
        return {"teacher": weights.teacher}
    recipe = make_recipe(weights.config, steps_per_epoch=1)
    state = state_from_student(recipe, weights.student)
    state = state.replace(
        ema=state.ema._replace(teacher=weights.teacher["params"]),
        teacher_stats=weights.teacher["batch_stats"],
        center=state.center if weights.center is None else np.asarray(weights.center, state.center.dtype),
        opt_state=state.opt_state if weights.moments is None else _fill(state.opt_state, weights.moments),
    )
    return to_items(state)


def _fill(opt_state: Any, moments: Moments) -> Any:
    """An AdamW state with these moments; a count of several parameters is the largest of theirs."""

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


def _variables(tree: Any) -> dict[str, Any]:
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats") or {}}
