"""Images with object masks, from VOC, `scenes` or folders of images and masks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from dino_jax.data.scenes_source import Scenes
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval.images import check_all, list_images, listed, read_image, read_labels
from dino_jax.eval.splits import train_test

IGNORE = 255
_log = logging.getLogger(__name__)
VOC_CLASSES = 21  # background included


class Masked(NamedTuple):
    """An image uint8 [H, W, C] with object numbers uint8 [H, W] and class numbers uint8 [H, W].

    0 is background, 255 is ignored; every other number is one object or class.
    """

    pixels: np.ndarray
    objects: np.ndarray
    classes: np.ndarray


class MaskedImages(NamedTuple):
    """A data set: its size, `load(i) -> Masked`, and the number of classes with background (None: unknown)."""

    size: int
    load: Callable[[int], Masked]
    num_classes: int | None


def open_masks(data: str, split: str, channels: int = 3) -> MaskedImages:
    """Opens `data`: a `scenes:` spec, a VOC folder (`split` of its ImageSets), or a folder with `images` and `masks`.

    Raises:
      UserError: none of these, or an image without a mask.
    """
    if data.startswith("scenes:"):
        return _scenes(data)
    root = voc_root(data)
    if root is not None:
        return _voc(root, split, channels)
    root = epath.Path(data)
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return _folder(root, channels)
    raise UserError(
        f"--data={data}: neither a VOC folder (JPEGImages, SegmentationObject, ImageSets) nor one with images and masks"
    )


def check_masks(masked: MaskedImages, where: str, threads: int = 4) -> int:
    """Loads everything once, before the work; returns the largest class number.

    Raises:
      UserError: an image or mask cannot be used, or has a class beyond the data set's; the message names it.
    """

    def largest(index: int) -> int:
        classes = masked.load(index).classes
        return int(classes[classes != IGNORE].max(initial=0))

    found = max(check_all(largest, masked.size, threads))
    if masked.num_classes is not None and found >= masked.num_classes:
        raise UserError(f"{where}: a mask has class {found}, but there are only {masked.num_classes} classes")
    return found


def as_objects(labels: np.ndarray, binary: bool) -> np.ndarray:
    """Label maps uint8 [..., h, w], with 255 as object 1 if the data set's masks are black and white (`binary`)."""
    return (labels > 0).astype(np.uint8) if binary else labels


def _kind(labels: np.ndarray) -> str:
    return "numbers" if not is_binary(labels) else "black and white" if labels.any() else "empty"


def is_binary(labels: np.ndarray) -> bool:
    """Whether a label map holds just 0 and 255: a black and white mask, or one without objects."""
    return bool(np.isin(labels, (0, IGNORE)).all())


def train_test_masks(data: str, channels: int = 3) -> tuple[MaskedImages, MaskedImages]:
    """Training and test images of a VOC folder, or of the splits that `splits.train_test` finds."""
    if voc_root(data) is not None:
        return open_masks(data, "train", channels), open_masks(data, "val", channels)
    train, test = train_test(data)
    return open_masks(train, "train", channels), open_masks(test, "val", channels)


def voc_root(data: str) -> epath.Path | None:
    """The folder with VOC's layout, at or in `data`, or None."""
    here = epath.Path(data)
    for root in (here, here / "VOC2012", here / "VOCdevkit" / "VOC2012"):
        if (root / "ImageSets" / "Segmentation").is_dir():
            return root
    return None


def _scenes(spec: str) -> MaskedImages:
    source = open_source(spec)
    if not isinstance(source, Scenes):
        raise UserError(f"{spec}: not scenes")

    def load(index: int) -> Masked:
        image, label, _ = source[index]
        mask = source.mask(index).astype(np.uint8)
        return Masked(np.asarray(image), mask, mask * np.uint8(label + 1))

    return MaskedImages(len(source), load, len(source.class_names) + 1)


def _voc(root: epath.Path, split: str, channels: int) -> MaskedImages:
    names = listed(root / "ImageSets" / "Segmentation" / f"{split}.txt", "give the VOC folder as --data")

    def load(index: int) -> Masked:
        objects, classes = (
            read_labels(root / folder / f"{names[index]}.png") for folder in ("SegmentationObject", "SegmentationClass")
        )
        pixels = read_image(root / "JPEGImages" / f"{names[index]}.jpg", channels)
        return _checked(names[index], Masked(pixels, objects, classes))

    return MaskedImages(len(names), load, VOC_CLASSES)


def _folder(root: epath.Path, channels: int) -> MaskedImages:
    images = list_images(root / "images")
    masks = {path.stem: path for path in list_images(root / "masks")}
    alone = [path for path in images if path.stem not in masks]
    if alone:
        raise UserError(f"{alone[0]}: no mask with this name in {root / 'masks'}")
    if (same := len(images) - len({path.stem for path in images})) or len(masks) < len(list_images(root / "masks")):
        raise UserError(f"{root}: {'images' if same else 'masks'} of the same name: keep one of each")
    kinds = check_all(lambda i: _kind(read_labels(masks[images[i].stem])), len(images))
    binary = kinds.count("numbers") == 0
    if not binary and (odd := kinds.count("black and white")):
        _log.warning("%s: %d masks hold just 0 and 255, others object numbers: 255 is ignored everywhere", root, odd)

    def load(index: int) -> Masked:
        labels = as_objects(read_labels(masks[images[index].stem]), binary)
        return _checked(str(images[index]), Masked(read_image(images[index], channels), labels, labels))

    return MaskedImages(len(images), load, None)


def _checked(name: str, masked: Masked) -> Masked:
    for mask in masked[1:]:
        if mask.shape != masked.pixels.shape[:2]:
            raise UserError(f"{name}: mask of {mask.shape} pixels for an image of {masked.pixels.shape[:2]}")
    return masked
