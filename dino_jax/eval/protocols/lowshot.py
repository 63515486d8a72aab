"""Low-shot classification: logistic regression on frozen features with few labels (paper table 11).

The regression has an L2 penalty of lambda = 0.1 / n and no intercept (issue 121 of the official repository). Features
are the backbone's output without augmentation. The labeled subset is drawn per class from a seed, or listed in files.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dino_jax.config import Key
from dino_jax.data.folder_source import Files
from dino_jax.data.sources import Source, open_source
from dino_jax.data.storage import read_text
from dino_jax.errors import UserError
from dino_jax.eval.features import source_features
from dino_jax.eval.logistic import fit_logistic
from dino_jax.eval.protocol import CROP, RESIZE, WORKERS, Protocol
from dino_jax.eval.splits import CLASSES, check_labels, open_splits
from dino_jax.inference.model import Model

KEYS = {
    "shares": Key((0.01, 0.1), "shares of the labels to use", "(0, 1]"),
    "lists": Key((), "files that list training images, such as SimCLR's; replaces `shares`"),
    "penalty": Key(0.1, "lambda times the number of labeled images", "(0, inf)"),
    "tolerance": Key(1e-4, "stop within this certified distance of the optimal objective", "(0, inf)"),
    "seed": Key(0, "random seed of the subsets", "[0, 4294967295]"),
    "resize": RESIZE,
    "crop": CROP,
    "batch_size": Key(256, "images per batch", "[1, inf)"),
    "workers": WORKERS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`top1_<subset>` in percent for every subset, and `gap_<subset>`, the fit's bound above the optimum.

    `data` is as in `splits.train_test`; features are cached in `workdir`.
    """
    if len({epath.Path(str(path)).stem for path in config.lists}) < len(config.lists):
        raise UserError(f"--config.lists={config.lists}: figures are named by the files' names, which must differ")
    train_spec, train, test_spec, test = open_splits(data)
    for path in config.lists:
        listed(str(path), train_spec)
    test_features, test_labels = source_features(model, test, test_spec, config, workdir=workdir)
    figures = {}
    for name, (features, labels) in _subsets(model, train, train_spec, config, workdir):
        num_classes = check_labels(labels, test_labels, data)
        fit = fit_logistic(features, labels, num_classes, config.penalty / len(labels), tolerance=config.tolerance)
        predicted = np.argmax(test_features @ fit.weights, axis=1)
        figures[f"top1_{name}"] = 100 * float(np.mean(predicted == test_labels))
        figures[f"gap_{name}"] = fit.gap
    return figures


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=CLASSES,
    whole_patches=("crop",),
    published={"top1_1%": {"S/16": 64.5}, "top1_10%": {"S/16": 72.2}, "top1_100%": {"S/16": 75.7}},
    source="ImageNet; the paper's appendix",
    order=30,
)


def _subsets(
    model: Model, train: Source, spec: str, config: ConfigDict, workdir: str | None
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Name, features and labels of each labeled subset."""
    for path in config.lists:
        yield (
            epath.Path(str(path)).stem,
            source_features(model, listed(str(path), spec), str(path), config, workdir=workdir),
        )
    if config.lists:
        return
    features, labels = source_features(model, train, spec, config, workdir=workdir)
    for share in config.shares:
        rows = per_class(labels, share, config.seed)
        yield f"{100 * share:g}%", (features[rows], labels[rows])


def per_class(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws rows with `share` of each class, at least one, from `seed`; subsets are nested."""
    if not 0 < share <= 1:
        raise UserError(f"--config.shares: a share must lie in 0..1, not {share}")
    rows = []
    for label in np.unique(labels):
        mine = np.random.default_rng((seed, int(label) + 1)).permutation(np.flatnonzero(labels == label))
        rows.append(mine[: max(1, round(share * len(mine)))])
    return np.sort(np.concatenate(rows))


def listed(path: str, train: str) -> Files:
    """The images of the class folders in `train` that are listed in the file at `path`, one per line.

    A name is a path in `train`, or just a file name as in SimCLR's lists, with its class folder before the `_`.

    Raises:
      UserError: the file cannot be read, is empty, or lists a class without a folder.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    root = epath.Path(train.removeprefix("folder:"))
    if not root.is_dir():
        raise UserError(f"--config.lists: {path}: --data names no folder of training images, but {train}")
    classes = list(open_source(train).class_names or ())
    names = [name if "/" in name else f"{name.partition('_')[0]}/{name}" for name in names]
    unknown = [name for name in names if name.partition("/")[0] not in classes]
    if unknown or not names:
        raise UserError(f"--config.lists: {path} lists {unknown[0] if unknown else 'nothing'}, not found in {train}")
    return Files(str(root), names, [classes.index(name.partition("/")[0]) for name in names], classes)
