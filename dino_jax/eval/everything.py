"""`dino-jax eval all`: every protocol that the given data allow, save fine-tuning: that is a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dino_jax.data.sources import split_spec
from dino_jax.errors import UserError
from dino_jax.eval.masks import voc_root
from dino_jax.eval.protocols import copydetection, dense, knn, linear, lowshot, retrieval, voc, vos
from dino_jax.eval.splits import TEST, TRAIN
from dino_jax.inference.model import Model

log = logging.getLogger(__name__)


def _classes(folder: epath.Path) -> bool:
    return all(any((folder / name).is_dir() for name in names) for names in (TRAIN, TEST))


def _masks(folder: epath.Path) -> bool:
    return voc_root(str(folder)) is not None or ((folder / "images").is_dir() and (folder / "masks").is_dir())


class Part(NamedTuple):
    """A protocol, what tells that a folder is its data, that in words, and whether it needs patches."""

    module: ModuleType
    fits: Callable[[epath.Path], bool]
    wanted: str
    patches: bool = False
    scenes: str | None = None  # what it takes of a pair of `scenes:` specs: both, or the test part


PARTS = {
    "knn": Part(knn, _classes, "a folder with train and val", scenes="both"),
    "linear": Part(linear, _classes, "a folder with train and val", scenes="both"),
    "lowshot": Part(lowshot, _classes, "a folder with train and val", scenes="both"),
    "retrieval": Part(retrieval, lambda f: any((f / s).is_dir() for s in retrieval.SETS), "roxford5k or rparis6k"),
    "copydetection": Part(
        copydetection,
        lambda f: (f / "original").is_dir() and (f / "strong").is_dir(),
        "a folder with original and strong",
        patches=True,
    ),
    "vos": Part(
        vos, lambda f: (f / "ImageSets" / "2017").is_dir(), "DAVIS's ImageSets/2017", patches=True, scenes="test"
    ),
    "voc": Part(voc, _masks, "a VOC folder, or one with images and masks", patches=True, scenes="test"),
    "dense": Part(dense, lambda f: voc_root(str(f)) is not None, "a VOC folder", patches=True, scenes="both"),
}


def default_config() -> ConfigDict:
    """The keys of every protocol, as `PROTOCOL.KEY`."""
    return ConfigDict({name: part.module.default_config() for name, part in PARTS.items()}).lock()


def find(data: str) -> dict[str, str]:
    """The data of each protocol: in a folder or right below it, or from two sources `TRAIN,TEST`.

    Raises:
      UserError: there is no such folder or source, or nothing in it for any protocol.
    """
    if data.count(",") == 1:
        kinds = {split_spec(spec.strip())[0] for spec in data.split(",")}
        chosen = {"both": data, "test": data.split(",")[1].strip()}
        if kinds == {"scenes"}:
            return {name: chosen[part.scenes] for name, part in PARTS.items() if part.scenes is not None}
        return {name: data for name, part in PARTS.items() if part.fits is _classes}
    root = epath.Path(data)
    if not root.is_dir():
        raise UserError(f"--data={data}: no such folder, nor two sources as TRAIN,TEST")
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    found = {name: next((f for f in folders if part.fits(f)), None) for name, part in PARTS.items()}
    if not any(found.values()):
        raise UserError(f"--data={data}: no data set of any protocol in it or right below it")
    return {name: str(folder) for name, folder in found.items() if folder is not None}


def evaluate(
    model: Model, data: str, config: ConfigDict, workdir: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(protocol, figures) one after another, as `config` has them; a notice for each that is left out.

    Raises:
      UserError: at the end, if protocols failed on data that are there; the others were evaluated before.
    """
    found = find(data)
    failed: dict[str, str] = {}
    for name, part in PARTS.items():
        if name not in found:
            log.info("%s is left out: no %s in %s", name, part.wanted.removeprefix("a "), data)
        elif part.patches and model.backbone.patch_size is None:
            log.info("%s is left out: it needs patches, which this backbone has not", name)
        else:
            try:
                yield name, part.module.evaluate(model, found[name], config[name], workdir)
            except UserError as error:
                log.warning("%s failed: %s", name, error)
                failed[name] = str(error)
    log.info("finetune is left out: it trains the whole network; run it by its name")
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(found)} protocols failed: {reasons}")
