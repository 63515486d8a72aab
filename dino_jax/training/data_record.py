"""`WORKDIR/data.json`: which data a run has seen, so that it never goes on with others unnoticed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import jax
from etils import epath
from ml_collections import ConfigDict

from dino_jax.data.identity import Identity, difference, identity_of
from dino_jax.data.pipeline import steps_per_epoch
from dino_jax.data.sources import Source
from dino_jax.data.storage import read_json, write_atomically, writing
from dino_jax.errors import UserError
from dino_jax.training.metrics import read_metrics

log = logging.getLogger(__name__)

FILE = "data.json"
TRAIN = "data.train"


def claim_data(workdir: epath.Path, config: ConfigDict, sources: Mapping[str, Source], trained: int) -> None:
    """Writes the identity of a run's data sets, or compares it with what the run has seen.

    Args:
      sources: by configuration key; `data.train` and those of the online evaluations.
      trained: the last saved step; at 0 nothing has been seen, and the file is written again.

    Raises:
      UserError: a data set has changed, unless `run.accept_new_data`; `data.json` is damaged.
    """
    path = workdir / FILE
    found = {key: identity_of(source) for key, source in sources.items()}
    saved = _read(path) if trained and path.exists() else {}
    epoch_steps = steps_per_epoch(found[TRAIN]["images"], config.batch_size)
    changes = {key: what for key in found if key in saved and (what := difference(saved[key], found[key]))}
    if trained and TRAIN not in saved and (was := _epoch_steps(workdir)) not in (None, epoch_steps):
        changes[TRAIN] = f"an epoch is {epoch_steps} steps where it was {was}"  # of a run without this file
    if changes:
        key, what = next(iter(changes.items()))
        then = ""
        if TRAIN in changes:
            total = config.epochs * epoch_steps
            then = (
                f"step {trained} is then epoch {trained / epoch_steps:.2f}, of {total} steps in all, and the learning "
                "rate and other schedules follow"
            )
        if not config.run.accept_new_data:
            raise UserError(
                f"{workdir}: {key} has changed since this run began: {what}; restore it, or begin a new --workdir with "
                f"--config.init_from={workdir}, or accept it with --config.run.accept_new_data=True"
                + (f" ({then})" if then else "")
            )
        log.warning("%s has changed (%s); accepted%s", key, what, f": {then}" if then else "")
    if jax.process_index() == 0 and saved != found:
        with writing(f"--workdir={workdir}: cannot write there"):
            write_atomically(path, json.dumps(found, indent=1) + "\n")


def _read(path: epath.Path) -> dict[str, Identity]:
    saved = read_json(path)
    for identity in saved.values():
        whole = isinstance(identity, dict) and {"images", "listing", "contents"} <= identity.keys()
        if not whole or not isinstance(identity["contents"], dict):
            raise UserError(f"{path}: damaged: restore it, or remove it to go on with the data as it is now")
    return saved


def _epoch_steps(workdir: epath.Path) -> int | None:
    """Steps of an epoch by the run's metrics, if they say."""
    if not (workdir / "metrics.jsonl").exists():
        return None
    try:
        records = read_metrics(workdir)
    except UserError:  # damaged: whoever writes to it says so
        return None
    lengths = (record["step"] / record["epoch"] for record in reversed(records) if record.get("epoch"))
    return next(map(round, lengths), None)
