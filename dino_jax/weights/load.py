"""Weights as checkpoint folders, and any CKPT as weights: the one door to evaluate, export or start from."""

from __future__ import annotations

from typing import Any

from etils import epath

from dino_jax import config_io
from dino_jax.weights import checkpoint, importer, names
from dino_jax.weights.importer import Weights


def open_weights(ckpt: epath.PathLike, *, heads: int | None = None, everything: bool = False) -> Weights:
    """The weights of a CKPT: a workdir, one step's folder, an imported folder, a weight file, a released model's name.

    Args:
      ckpt: local or gs:// path, or a key of `names.PRETRAINED`.
      heads: attention heads, where a weight file does not tell.
      everything: student and objectives' states too, if they are there; else the teacher alone is read.

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
    objectives = restored["rest"]["objectives"] if "rest" in restored else {}
    student = _variables(restored["student"]) if "student" in restored else None
    return Weights(config, _variables(restored["teacher"]), student, objectives)


def _variables(tree: Any) -> dict[str, Any]:
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats") or {}}
