"""Dense transfer: semantic segmentation by a linear head on frozen patch tokens, scored by mean IoU.

The head predicts class scores per patch, upsampled bilinearly to the image. It is trained by AdamW with a cosine
schedule on random resized and flipped crops. Test images are resized to a square and scored at their original size.
Data: VOC's layout (21 classes, trained on `train`, tested on `val`), `scenes:` specs, or folders with images and masks.

Legend: B batch, h x w patches, S side in pixels, D width, K classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.errors import UserError
from dino_jax.eval.batches import cut, data_mesh, draw_crop, rounded
from dino_jax.eval.draw import SHOWN, palette, save_rows, tile, tinted
from dino_jax.eval.features import Patches, run, whole_patches
from dino_jax.eval.images import grouped, linear_matrix, nearest, parallel, resize
from dino_jax.eval.masks import IGNORE, Masked, MaskedImages, check_masks, train_test_masks, voc_root
from dino_jax.eval.protocol import SEED, THREADS, Data, Protocol
from dino_jax.eval.results import optional
from dino_jax.inference.model import Forward, Model
from dino_jax.parallel.sharding import process_rows, replicated, to_devices

_log = logging.getLogger(__name__)

KEYS = {
    "size": Key(480, "side of the square input, rounded down to whole patches", "[1, inf)", most=MOST_PIXELS),
    "epochs": Key(20, "passes over the training images", "[1, inf)"),
    "batch_size": Key(16, "images per step, over all devices", "[1, inf)"),
    "lr": Key(1e-3, "initial learning rate, with a cosine schedule", "(0, inf)"),
    "weight_decay": Key(1e-4, "of the head", "[0, inf)"),
    "scale": Key((0.25, 1.0), "area of a training crop as a share of the image, low and high", "(0, 1]", ordered=True),
    "seed": SEED,
    "threads": THREADS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`miou` over the classes that occur (background included) and `pixel_accuracy`, in percent.

    With a `workdir`, `dense.png` there shows some images, ground truth and predictions.
    """
    train, test = train_test_masks(data, len(model.mean))
    whole_patches(model, config.size)
    largest = max(check_masks(part, f"--data={data}", config.threads) for part in (train, test))
    classes = train.num_classes or largest + 1
    head = fit(model, train, classes, config)
    path = None if workdir is None else epath.Path(workdir) / "dense.png"
    return iou_scores(confusion(model, head, test, classes, config, path))


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=Data("VOC folder", lambda folder: voc_root(str(folder)) is not None, scenes="both"),
    needs_patches=True,
    order=80,
)


def iou_scores(counts: np.ndarray) -> dict[str, float]:
    """Figures from a confusion matrix [K truth, K predicted] of pixels."""
    right = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - right
    return {
        "miou": 100 * float(np.mean(right[union > 0] / union[union > 0])),
        "pixel_accuracy": 100 * float(right.sum() / counts.sum()),
    }


def fit(model: Model, train: MaskedImages, classes: int, config: ConfigDict) -> dict[str, jax.Array]:
    """Trains the head: kernel [D, K], bias [K]."""
    mesh = data_mesh()
    size = rounded(config.batch_size, mesh)
    steps = config.epochs * -(-train.size // size)
    schedule = optax.cosine_decay_schedule(config.lr, steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    side = whole_patches(model, config.size)
    shape = jax.ShapeDtypeStruct((1, side, side, len(model.mean)), jnp.uint8)
    width = jax.eval_shape(functools.partial(_tokens, model.forward), model.variables, shape).shape[-1]
    head = {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    variables, head = jax.device_put((model.variables, head), replicated(mesh))
    opt_state = jax.device_put(optimizer.init(head), replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(variables, head, opt_state, batch):
        tokens = jax.lax.stop_gradient(_tokens(model.forward, variables, batch["image"]))
        grads = jax.grad(lambda head: _loss(head, tokens, batch["labels"]))(head)
        updates, opt_state = optimizer.update(grads, opt_state, head)
        return optax.apply_updates(head, updates), opt_state

    for epoch in range(config.epochs):
        for batch in _train_batches(train, side, size, process_rows(size, mesh), epoch, config):
            head, opt_state = step(variables, head, opt_state, to_devices(batch, mesh, size))
        _log.info("epoch %d of %d", epoch + 1, config.epochs)
    return head


def _loss(head: dict[str, jax.Array], tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the labeled pixels [B, S, S]."""
    logits = _pixels(head, tokens, labels.shape[1])
    counted = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0).astype(jnp.int32))
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


def _pixels(head: dict[str, jax.Array], tokens: jax.Array, side: int) -> jax.Array:
    """Class scores per pixel, upsampled bilinearly: [B, h, w, D] -> [B, S, S, K]."""
    scores = jnp.einsum("bhwd,dk->bhwk", tokens, head["kernel"], precision="highest") + head["bias"]
    rows, columns = (jnp.asarray(linear_matrix(n, side), jnp.float32) for n in scores.shape[1:3])
    return jnp.einsum("yh,xw,bhwk->byxk", rows, columns, scores, precision="highest")


def _tokens(net: Forward, variables: Any, images: jax.Array) -> jax.Array:
    tokens: jax.Array = net(variables, images, Patches())
    return tokens


def _train_batches(
    train: MaskedImages, side: int, size: int, mine: np.ndarray, epoch: int, config: ConfigDict
) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches of an epoch: `image` uint8 [b, S, S, C], `labels` uint8 [b, S, S]; padding is IGNORE."""

    def load(row: int | None) -> tuple[np.ndarray, np.ndarray]:
        pixels, _, classes = train.load(0 if row is None else row)
        rng = np.random.default_rng((config.seed, epoch, row or 0))
        box, flip = draw_crop(classes.shape[0], classes.shape[1], rng, tuple(config.scale))
        image = cut(pixels, box, flip, side, Image.Resampling.BILINEAR)
        labels = cut(classes[..., None], box, flip, side, Image.Resampling.NEAREST)[..., 0]
        return image, np.full_like(labels, IGNORE) if row is None else labels

    order: list[int | None] = list(np.random.default_rng((config.seed, epoch)).permutation(train.size).tolist())
    order += [None] * (-len(order) % size)
    rows = (order[start + place] for start in range(0, len(order), size) for place in mine)
    for group in grouped(parallel(load, rows, config.threads), len(mine)):
        yield {"image": np.stack([image for image, _ in group]), "labels": np.stack([labels for _, labels in group])}


def confusion(
    model: Model,
    head: dict[str, jax.Array],
    test: MaskedImages,
    classes: int,
    config: ConfigDict,
    drawing: epath.Path | None = None,
) -> np.ndarray:
    """Pixel counts by true and predicted class, int64 [K, K]; unlabeled pixels are skipped."""
    side = whole_patches(model, config.size)
    head = jax.device_get(head)
    predict = jax.jit(lambda tokens: jnp.argmax(_pixels(head, tokens, side), -1).astype(jnp.uint8))

    def load(row: int) -> tuple[np.ndarray, Masked]:
        masked = test.load(row)
        return resize(masked.pixels, side, side, Image.Resampling.BILINEAR), masked

    groups = grouped(parallel(load, range(test.size), config.threads), config.batch_size)
    batches = ({"image": np.stack([i for i, _ in group]), "masked": [x for _, x in group]} for group in groups)
    counts = np.zeros((classes, classes), np.int64)
    shown: list[list[np.ndarray]] = []
    for tokens, batch in run(model, Patches(), batches):
        for predicted, masked in zip(np.asarray(predict(tokens)), batch["masked"], strict=True):
            labels, predicted = masked.classes, nearest(predicted, *masked.classes.shape)
            counted = labels != IGNORE
            if drawing is not None and len(shown) < SHOWN:
                with optional(str(drawing)):
                    maps = np.where(counted, labels, 0), predicted
                    shown.append([masked.pixels, *(tinted(masked.pixels, map_, palette()) for map_ in maps)])
            if labels[counted].max(initial=0) >= classes:
                raise UserError(f"a mask has class {labels[counted].max()}, but there are only {classes} classes")
            cells = labels[counted].astype(int) * classes + predicted[counted]
            counts += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    if not counts.sum():
        raise UserError("dense: the test masks have no labeled pixels: check --data")
    if drawing is not None:
        with optional(str(drawing)):
            save_rows(drawing, [[tile(panel, 160) for panel in row] for row in shown])
    return counts
