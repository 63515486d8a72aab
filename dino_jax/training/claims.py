"""What a run checks of its workdir and its processes before it starts."""

from __future__ import annotations

import jax
from etils import epath
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.data.identity import data_fingerprint
from dino_jax.data.sources import Source
from dino_jax.data.storage import ensure_writable, read_text, write_atomically, writing
from dino_jax.errors import UserError
from dino_jax.weights.checkpoint import restore_config, steps


def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes `workdir/config.json`, or checks `config` against it: only `run.*` may differ."""
    path = workdir / "config.json"
    with writing(f"--workdir={workdir}: cannot write there"):
        saved = read_text(path) if path.exists() else None
        if saved is None and (found := steps(workdir / "checkpoints")):  # config.json was deleted
            saved = restore_config(workdir / "checkpoints", found[-1])
        if saved is not None and (differences := config_io.differences(config_io.from_json(saved, str(path)), config)):
            raise UserError(
                f"{path}: this workdir belongs to a run of another configuration ({'; '.join(differences)}): "
                "choose another --workdir, or use the same values to resume"
            )
        if jax.process_index() == 0:
            write_atomically(path, config_io.to_json(config))
            ensure_writable(workdir / "checkpoints", f"{workdir / 'checkpoints'}")


def facts(config: ConfigDict, workdir: epath.Path, source: Source) -> dict[str, str]:
    """What all processes of a run must agree on, besides the code."""
    settings = {f"config.{key}": repr(value) for key, value in config_io.flatten(config).items()}
    data = {"images in data.train": str(len(source)), "contents of data.train": data_fingerprint(source)}
    return settings | data | {"workdir": str(workdir)}
