"""`dino-jax eval all`: every protocol that the data in a folder allows, save fine-tuning: that is a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from dino_jax.errors import UserError
from dino_jax.eval import copydetection, dense, knn, linear, lowshot, retrieval, voc, vos
from dino_jax.eval.features import Frozen
from dino_jax.eval.masks import voc_root
from dino_jax.eval.splits import TEST, TRAIN

# What tells that a folder is a protocol's data.
PROTOCOLS = {
    "knn": (knn, lambda folder: _classes(folder)),
    "linear": (linear, lambda folder: _classes(folder)),
    "lowshot": (lowshot, lambda folder: _classes(folder)),
    "retrieval": (retrieval, lambda folder: any((folder / name).is_dir() for name in retrieval.SETS)),
    "copydetection": (copydetection, lambda folder: (folder / "original").is_dir() and (folder / "strong").is_dir()),
    "vos": (vos, lambda folder: (folder / "ImageSets" / "2017").is_dir()),
    "voc": (voc, lambda folder: voc_root(str(folder)) is not None),
    "dense": (dense, lambda folder: voc_root(str(folder)) is not None),
}


def _classes(folder: epath.Path) -> bool:
    return all(any((folder / name).is_dir() for name in names) for names in (TRAIN, TEST))


def find(data: str) -> dict[str, str]:
    """The folder of each protocol whose data lie in `data` or right below it."""
    root = epath.Path(data)
    if not root.is_dir():
        raise UserError(f"--data={data}: no such folder")
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    found = {
        name: next((str(folder) for folder in folders if fits(folder)), None) for name, (_, fits) in PROTOCOLS.items()
    }
    if not any(found.values()):
        raise UserError(f"--data={data}: no data set of any protocol in it or right below it")
    return {name: folder for name, folder in found.items() if folder is not None}


def evaluate(model: Frozen, data: str, workdir: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(protocol, figures) one after another, each with its default settings."""
    for name, folder in find(data).items():
        module = PROTOCOLS[name][0]
        if model.backbone.patch_size is None and module in (copydetection, dense, voc, vos):
            continue  # these need patches
        yield name, module.evaluate(model, folder, module.default_config(), workdir)
