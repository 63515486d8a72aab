"""Finds a protocol's training and test images from `--data`, and their classes."""

from __future__ import annotations

import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage
from dino_jax.data.sources import Source
from dino_jax.errors import UserError
from dino_jax.eval.protocol import Data

TRAIN, TEST = ("train", "training"), ("val", "validation", "test", "testing")


def _has_classes(folder: epath.Path) -> bool:
    return all(any((folder / name).is_dir() for name in names) for names in (TRAIN, TEST))


CLASSES = Data("folder with train and val", _has_classes, sources=True, scenes="both")


def train_test(data: str) -> tuple[str, str]:
    """The training and test source specs in `--data`: `TRAIN,TEST`, or a folder with `train` and `val` (or `test`).

    Raises:
      UserError: `data` is neither.
    """
    if data.count(",") == 1:
        train, test = data.split(",")
        return train.strip(), test.strip()
    root = epath.Path(data.removeprefix("folder:"))
    found = [next((root / name for name in names if (root / name).is_dir()), None) for names in (TRAIN, TEST)]
    if None in found:
        raise UserError(
            f"--data={data}: give two sources as TRAIN,TEST, or a folder with subfolders train and val (or test)"
        )
    return str(found[0]), str(found[1])


def check_labels(train_labels: np.ndarray, test_labels: np.ndarray, data: str) -> int:
    """The number of classes. Raises `UserError` if images are unlabeled or a test class has no training images."""
    for name, labels in (("training", train_labels), ("test", test_labels)):
        if not len(labels) or labels.min() < 0:
            raise UserError(f"--data={data}: the {name} images have no labels: use class folders or a labeled list")
    absent = np.setdiff1d(test_labels, train_labels)
    if len(absent):
        raise UserError(
            f"--data={data}: {len(absent)} test classes have no training images, first class {absent[0]}: "
            "give both splits the same class folders"
        )
    return int(train_labels.max()) + 1


def class_count(train: Source, test: Source, data: str) -> int:
    """The number of classes of two sources, from their class names or else from all labels.

    Raises:
      UserError: unlabeled images or different classes.
    """
    if train.class_names and test.class_names:
        for mine, other in zip(train.class_names, test.class_names, strict=False):
            if mine != other:
                raise UserError(f"--data={data}: the splits have different classes, first {mine} and {other}")
        if len(train.class_names) != len(test.class_names):
            raise UserError(
                f"--data={data}: the splits have {len(train.class_names)} and {len(test.class_names)} classes"
            )
        return len(train.class_names)
    return check_labels(_labels(train), _labels(test), data)


def _labels(source: Source) -> np.ndarray:
    found = []
    for row in range(len(source)):
        try:
            found.append(source[row].label)
        except BadImage:
            continue
        if found[-1] < 0:
            break
    return np.array(found)
