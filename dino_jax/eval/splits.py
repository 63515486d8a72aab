"""Finds a protocol's training and test images from `--data`, and their classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage
from dino_jax.data.example import Example
from dino_jax.data.sources import Source, open_source
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


class Relabeled:
    """A source whose labels are numbered by `class_names`, matched by name, instead of by its own class names."""

    def __init__(self, source: Source, class_names: Sequence[str]):
        numbers = {name: number for number, name in enumerate(class_names)}
        self.source, self.class_names = source, tuple(class_names)
        self._numbers = [numbers.get(name, -1) for name in source.class_names or ()]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return example._replace(label=self._numbers[example.label]) if example.label >= 0 else example


def in_classes_of(train: Source, test: Source, where: str) -> Source:
    """`test` with the class numbers of `train`, matched by class name; unchanged if either has no class names.

    Raises:
      UserError: `test` has a class that `train` does not have; the message begins with `where`.
    """
    if not train.class_names or not test.class_names or train.class_names == test.class_names:
        return test
    labels = getattr(test, "labels", None)  # a class folder may be empty
    held = range(len(test.class_names)) if labels is None else np.unique(labels[labels >= 0])
    if absent := [name for name in (test.class_names[i] for i in held) if name not in train.class_names]:
        raise UserError(
            f"{where}: {len(absent)} test classes have no training images, first class {absent[0]}: "
            "add them to the training images, or take them out of the test images"
        )
    return Relabeled(test, train.class_names)


def open_splits(data: str) -> tuple[str, Source, str, Source]:
    """The training and the test images of `--data`, each as its spec and its source, in one numbering of classes."""
    train, test = train_test(data)
    sources = open_source(train), open_source(test)
    return train, sources[0], test, in_classes_of(*sources, f"--data={data}")


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
    """The number of classes of two sources (see `open_splits`), from their class names or else from all labels.

    Raises:
      UserError: unlabeled images, or test classes without training images.
    """
    if train.class_names and test.class_names:
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
