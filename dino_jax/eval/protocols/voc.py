"""Object segmentation by CLS attention: Jaccard similarity on VOC12 (paper section 4.2, figure 4).

Each head's attention mask keeps the patches with the most attention, up to a share of it (60% in the text, 80% in
appendix D). An object's score is the best head's intersection over union, and an image's the mean of its objects (the
author's description in issue 54 of the official repository). Images are resized to a square, bilinear; attention masks
are compared at the image's original size.

Legend: B batch, H heads, N patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.errors import UserError
from dino_jax.eval.draw import GREEN, ORANGE, SHOWN, save_rows, tile, tinted
from dino_jax.eval.features import ClsAttention, run, whole_patches
from dino_jax.eval.images import grouped, parallel, resize
from dino_jax.eval.masks import IGNORE, Masked, MaskedImages, check_masks, open_masks, voc_root
from dino_jax.eval.protocol import THREADS, Data, Protocol
from dino_jax.eval.results import optional
from dino_jax.inference.model import Model
from dino_jax.weights.load import open_weights

KEYS = {
    "masses": Key((0.6, 0.8), "shares of the attention that the attention masks keep", "(0, 1]"),
    "size": Key(
        480,
        "side of the square that images are resized to, rounded down to whole patches",
        "[1, inf)",
        most=MOST_PIXELS,
    ),
    "block": Key(-1, "block to take the attention from; negative: from the end"),
    "split": Key("val", "list in VOC's ImageSets/Segmentation"),
    "random": Key(False, "also score the network with random weights"),
    "supervised": Key(str, "also score this weight file of the network trained with labels, such as DeiT's"),
    "batch_size": Key(8, "images per batch", "[1, inf)"),
    "threads": THREADS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`jaccard_60` and `jaccard_80` in percent (by `config.masses`), with suffix `_random` or `_supervised` for those.

    `data` is as in `masks.open_masks`. With a `workdir`, `voc.png` there shows some images, truth and attention masks.
    """
    if len({round(100 * mass) for mass in config.masses}) < len(config.masses):
        raise UserError(f"--config.masses={config.masses}: figures are named by whole percents, which must differ")
    side = whole_patches(model, config.size)
    images = open_masks(data, config.split, len(model.mean))
    jax.eval_shape(  # a block that the model does not have is named before the images are read
        lambda variables, x: model.forward(variables, x, ClsAttention(config.block)),
        model.variables,
        jax.ShapeDtypeStruct((1, side, side, len(model.mean)), jnp.uint8),
    )
    check_masks(images, f"--data={data}", config.threads)
    references = _references(model, config)
    figures = _score(model, images, config, None if workdir is None else epath.Path(workdir) / "voc.png")
    for name, reference in references.items():
        figures |= {f"{key}_{name}": value for key, value in _score(reference, images, config, None).items()}
    return figures


def _has_masks(folder: epath.Path) -> bool:
    return voc_root(str(folder)) is not None or ((folder / "images").is_dir() and (folder / "masks").is_dir())


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=Data("VOC folder, or one with images and masks", _has_masks, scenes="test"),
    needs_patches=True,
    published={
        "jaccard_60": {"S/16": 45.9, "S/8": 44.7},
        "jaccard_60_random": {"S/16": 22.0, "S/8": 21.8},
        "jaccard_60_supervised": {"S/16": 27.3, "S/8": 23.7},
    },
    source="VOC12 val; the paper, figure 4",
    order=70,
)


def _references(model: Model, config: ConfigDict) -> dict[str, Model]:
    """The reference networks by name."""
    shape = jnp.zeros((1, *[whole_patches(model, config.size)] * 2, len(model.mean)))
    found = {}
    if config.random:
        found["random"] = dataclasses.replace(model, variables=jax.jit(model.backbone.init)(jax.random.key(0), shape))
    if config.supervised is not None:
        weights = open_weights(config.supervised, heads=model.backbone.heads)
        variables = {name: tree["backbone"] for name, tree in weights.teacher.items() if "backbone" in tree}
        expected = jax.eval_shape(model.backbone.init, jax.random.key(0), shape)
        if jax.tree.map(np.shape, variables["params"]) != jax.tree.map(np.shape, expected["params"]):
            raise UserError(f"--config.supervised={config.supervised}: not weights of the same network as --checkpoint")
        found["supervised"] = dataclasses.replace(model, variables=variables)
    return found


def _score(model: Model, images: MaskedImages, config: ConfigDict, path: epath.Path | None) -> dict[str, float]:
    side = whole_patches(model, config.size)
    scores: dict[float, list[float]] = {mass: [] for mass in config.masses}
    shown: list[list[np.ndarray]] = []
    for attention, batch in run(model, ClsAttention(config.block), _batches(images, side, config)):
        for masked, heads in zip(batch["masked"], attention, strict=True):  # heads [H, h, w]
            for mass in config.masses:
                masks = attention_masks(heads.reshape(len(heads), -1), mass).reshape(heads.shape)
                masks = enlarge(masks, *masked.objects.shape)
                scores[mass].append(image_jaccard(masks, masked.objects))
            if path is not None and len(shown) < SHOWN:
                with optional(str(path)):
                    shown.append(_row(masked, masks))
    if np.isnan(scores[config.masses[0]]).all():
        raise UserError("voc: no mask has an object: check --data")
    if path is not None:
        with optional(str(path)):
            save_rows(path, shown)
    return {f"jaccard_{round(100 * mass)}": 100 * float(np.nanmean(values)) for mass, values in scores.items()}


def _batches(images: MaskedImages, side: int, config: ConfigDict) -> Iterator[dict[str, Any]]:
    def load(index: int) -> tuple[np.ndarray, Masked]:
        masked = images.load(index)
        return resize(masked.pixels, side, side, Image.Resampling.BILINEAR), masked

    for group in grouped(parallel(load, range(images.size), config.threads), config.batch_size):
        yield {"image": np.stack([image for image, _ in group]), "masked": [masked for _, masked in group]}


def _row(masked: Masked, masks: np.ndarray) -> list[np.ndarray]:
    """Image, ground truth and the best head's attention mask (for all objects together)."""
    truth = (masked.objects > 0) & (masked.objects != IGNORE)
    best = masks[jaccard(masks, truth).argmax()]
    colors = np.array([(0, 0, 0), GREEN, ORANGE], np.uint8)
    panels = masked.pixels, *(tinted(masked.pixels, mask * n, colors) for n, mask in ((1, truth), (2, best)))
    return [tile(panel, 160) for panel in panels]


def attention_masks(attention: np.ndarray, mass: float) -> np.ndarray:
    """Boolean [..., N]: the fewest patches in each row of `attention` [..., N] with at least `mass` of its sum.

    As in the official `visualize_attention.py`, the smallest values are dropped while their sum is at most 1 - mass.
    """
    attention = np.asarray(attention, np.float64)
    order = np.argsort(attention, axis=-1, kind="stable")
    rising = np.take_along_axis(attention, order, -1)
    share = np.cumsum(rising / rising.sum(-1, keepdims=True), axis=-1)
    masks = np.zeros(attention.shape, bool)
    np.put_along_axis(masks, order, share > 1 - mass, axis=-1)
    return masks


def jaccard(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of boolean masks [..., h, w], broadcast; 0 if both are empty."""
    overlap = np.sum(mask & truth, axis=(-2, -1))
    union = np.sum(mask | truth, axis=(-2, -1))
    return overlap / np.maximum(union, 1)


def image_jaccard(masks: np.ndarray, objects: np.ndarray, ignore: int = IGNORE) -> float:
    """Best head's Jaccard similarity, averaged over the objects of one image; NaN without objects.

    Args:
      masks: bool [H, h, w], one per head.
      objects: int [h, w]; 0 is background, `ignore` is ignored, every other number is one object.
    """
    numbers = np.setdiff1d(objects, (0, ignore))
    if not len(numbers):
        return float("nan")
    return float(np.mean([jaccard(masks, objects == number).max() for number in numbers]))


def enlarge(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes masks [..., h, w] to [..., height, width] by nearest neighbor (integer multiples repeat patches)."""
    rows = np.arange(height) * masks.shape[-2] // height
    columns = np.arange(width) * masks.shape[-1] // width
    return masks[..., rows[:, None], columns]
