"""Opens the weights of any CKPT, for evaluation, export or starting a run."""

from __future__ import annotations

from typing import Any

from etils import epath

from dino_jax import config_io
from dino_jax.errors import UserError
from dino_jax.weights import checkpoint, importer, names
from dino_jax.weights.containers import weight_file
from dino_jax.weights.importer import Restored


def open_weights(
    ckpt: epath.PathLike, *, heads: int | None = None, everything: bool = False, **choice: Any
) -> Restored:
    """The weights of a CKPT: a workdir, one step's folder, an imported folder, a weight file, a released model's name.

    Args:
      ckpt: local or gs:// path, or a key of `names.PRETRAINED`.
      heads: attention heads, if a weight file does not determine them.
      choice: `key`, `prefix` and `grid` of `importer.read`, for weight files.
      everything: also read student and objectives' states, if present; else only the teacher.

    Raises:
      UserError: one line with the problem.
    """
    path = epath.Path(ckpt)
    is_run = path.is_dir() and (checkpoint.belongs_to_run(path) or weight_file(path) is None)
    if str(ckpt) in names.PRETRAINED or not is_run:
        return importer.read(ckpt, heads=heads, **choice)
    if given := [name for name, value in choice.items() if value is not None]:
        raise UserError(f"{ckpt}: --{given[0]} is for weight files, not for a run's checkpoints")
    directory, step = checkpoint.resolve(path)
    config = config_io.from_json(checkpoint.restore_config(directory, step))
    here = {item.name for item in (directory / str(step)).iterdir()}
    items = ["teacher", *(["student", "rest"] if everything and "student" in here else [])]
    abstract = {item: checkpoint.abstract(directory, step, item) for item in items}
    restored = checkpoint.restore(directory, step, abstract)
    objectives = restored["rest"]["objectives"] if "rest" in restored else {}
    student = _variables(restored["student"]) if "student" in restored else None
    return Restored(config, _variables(restored["teacher"]), student, objectives)


def _variables(tree: Any) -> dict[str, Any]:
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats") or {}}
