"""Linear classification of frozen features (paper table 2; official `eval_linear.py`), a grid of heads at once.

One forward pass feeds a linear head for every choice of features and learning rate: `4` means the CLS tokens of the
last four blocks, `1+avg` the last CLS and the mean patch token. Training is SGD with momentum 0.9 and no weight decay;
the learning rate is scaled by batch / 256 and follows a cosine over epochs. The official protocol reports the best
epoch on the test set; with `holdout`, head and epoch are selected on held-out training images.

Legend: B batch, F features, L learning rates, K classes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.eval.batches import Subset, crop_and_flip, data_mesh, test_batches, train_batches
from dino_jax.eval.features import Pooled, fingerprint, linear_input
from dino_jax.eval.protocol import RESIZE, SEED, THREADS, Protocol
from dino_jax.eval.results import load_arrays, optional, save_arrays
from dino_jax.eval.splits import CLASSES, class_count, open_splits, train_test
from dino_jax.inference.model import Forward, Model
from dino_jax.parallel.sharding import replicated
from dino_jax.weights.containers import is_tensors
from dino_jax.weights.names import PRETRAINED, fetch
from dino_jax.weights.pth import read_pth

_log = logging.getLogger(__name__)

Heads = dict[str, dict[str, Any]]  # choice of features -> kernel [L, F, K], bias [L, K]

KEYS = {
    "features": Key((), 'number of last blocks, +avg: with the mean patch token, e.g. ("4", "1+avg"); (): by backbone'),
    "lrs": Key(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "learning rates for 256 images; scaled by batch_size / 256",
        "(0, inf)",
    ),
    "epochs": Key(100, "passes over the training images", "[1, inf)"),
    "batch_size": Key(1024, "images per step, over all devices", "[1, inf)"),
    "eval_every": Key(1, "epochs between evaluations", "[1, inf)"),
    "holdout": Key(0.0, "share of training images held out to select head and epoch; 0: use the test set", "[0, 1)"),
    "head": Key(str, "test this linear head (.pth, or a released model's name) instead of training"),
    "resize": RESIZE,
    "crop": Key(224, "side of training crops and of the center crop of test images", "[1, inf)", most=MOST_PIXELS),
    "seed": SEED,
    "threads": THREADS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, Any]:
    """`top1` and `top5` in percent of the selected head, which head and how, and `top1_<head>` of each.

    `top1_<head>` is at the head's best epoch by the same rule. `data` is as in `splits.train_test`. With a `workdir`,
    heads are saved there after every evaluation, and an interrupted run resumes.
    """
    if config.head is not None:
        return _test_released(model, open_source(train_test(data)[1]), config)
    _, train, _, test = open_splits(data)
    classes = class_count(train, test, data)
    train, held = _hold_out(train, config)
    path = None if workdir is None else epath.Path(workdir) / _file_name(model, config, classes, len(train))
    epoch, heads, momentum, history = _restore(path, *_init(model, config, classes))
    while epoch < config.epochs:
        heads, momentum = _train_epoch(model, train, config, epoch, heads, momentum)
        epoch += 1
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            scores = [score(model, source, heads, config) for source in (test, held) if source is not None]
            history.append(np.concatenate([np.full((1, scores[0].shape[1]), epoch), *scores]))  # [3 or 5, heads]
            _log.info("epoch %d of %d: best head %.2f%%", epoch, config.epochs, scores[-1][0].max())
            if path is not None and jax.process_index() == 0:
                with optional(str(path)):
                    _save(path, epoch, heads, momentum, history)
    names = [f"{choice} lr={lr:g}" for choice in heads for lr in config.lrs]
    return _report(np.stack(history), names)


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=CLASSES,
    whole_patches=("crop",),
    published={
        "top1": {
            "S/16": 77.0,
            "S/8": 79.7,
            "B/16": 78.2,
            "B/8": 80.1,
            "RN50": 75.3,
            "XCiT-S12/16": 77.8,
            "XCiT-S12/8": 79.2,
            "XCiT-M24/16": 78.8,
            "XCiT-M24/8": 80.3,
        }
    },
    source="ImageNet; the official README",
    order=20,
)


def _report(history: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Figures from [evaluations, 3 or 5, heads]: epoch, test top-1, top-5, and maybe held-out top-1, top-5."""
    chosen_by = history[:, 1] if history.shape[1] == 3 else history[:, 3]
    best = chosen_by.argmax(axis=0)  # [heads] the best evaluation of each head
    head = int(chosen_by.max(axis=0).argmax())
    epoch, top1, top5 = (float(x) for x in history[best[head], :3, head])
    rule = "best epoch and head on the test set (official)" if history.shape[1] == 3 else "best on held-out images"
    figures: dict[str, Any] = {"top1": top1, "top5": top5, "head": names[head], "epoch": int(epoch), "selection": rule}
    return figures | {f"top1_{name}": float(history[best[i], 1, i]) for i, name in enumerate(names)}


def _hold_out(train: Source, config: ConfigDict) -> tuple[Source, Source | None]:
    """The images to train on, and those held out for selection."""
    if not config.holdout:
        return train, None
    order = np.random.default_rng(config.seed).permutation(len(train))
    count = max(1, round(config.holdout * len(train)))
    if count >= len(train):
        raise UserError(
            f"--config.holdout={config.holdout}: none of the {len(train)} training images is left: lower it"
        )
    return Subset(train, np.sort(order[count:])), Subset(train, np.sort(order[:count]))


def parse_choice(choice: str) -> tuple[int, bool]:
    """`4` -> (4, False), `1+avg` -> (1, True)."""
    match = re.fullmatch(r"([1-9]\d*)(\+avg)?", str(choice))
    if match is None:
        raise UserError(f"--config.features: {choice!r} must be a number of blocks such as 4, or 1+avg")
    return int(match[1]), match[2] is not None


def choices(model: Model, config: ConfigDict) -> tuple[str, ...]:
    """The choices of features; default the backbone's."""
    if config.features:
        return tuple(str(choice) for choice in config.features)
    return model.backbone.linear_features


def _init(model: Model, config: ConfigDict, classes: int) -> tuple[Heads, Heads]:
    """Initial heads and momentum: kernels N(0, 0.01), the same for every learning rate; the rest zero."""
    rng, rates = np.random.default_rng(config.seed), len(config.lrs)
    heads = {}
    for choice, width in widths(model, config).items():
        kernel = rng.normal(0, 0.01, (1, width, classes)).astype(np.float32)
        bias = np.zeros((rates, classes), np.float32)
        heads[choice] = {"kernel": np.repeat(kernel, rates, 0), "bias": bias}
    return heads, jax.tree.map(np.zeros_like, heads)


def widths(model: Model, config: ConfigDict) -> dict[str, int]:
    """Input width of a head for each choice of features."""
    images = jax.ShapeDtypeStruct((1, config.crop, config.crop, len(model.mean)), jnp.uint8)
    inputs = jax.eval_shape(functools.partial(_inputs, model.forward, choices(model, config)), model.variables, images)
    return {choice: x.shape[1] for choice, x in inputs.items()}


def _train_epoch(
    model: Model, source: Source, config: ConfigDict, epoch: int, heads: Heads, momentum: Heads
) -> tuple[Heads, Heads]:
    mesh = data_mesh()
    cosine = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    rates = np.array(config.lrs, np.float32) * np.float32(config.batch_size / 256 * cosine)
    variables, heads, momentum = jax.device_put((model.variables, heads, momentum), replicated(mesh))
    batches = train_batches(
        source,
        functools.partial(crop_and_flip, size=config.crop),
        mesh,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        channels=len(model.mean),
        threads=config.threads,
    )
    for batch in batches:
        heads, momentum = _train_step(model.forward, variables, heads, momentum, batch, rates)
    return heads, momentum


def score(model: Model, source: Source, heads: Heads, config: ConfigDict) -> np.ndarray:
    """Top-1 and top-5 of every head in percent, [2, heads]."""
    mesh = data_mesh()
    variables, heads = jax.device_put((model.variables, heads), replicated(mesh))
    counts = [
        jax.device_get(_test_step(model.forward, variables, heads, batch))
        for batch in test_batches(source, config, mesh, len(model.mean))
    ]
    total = sum(valid for _, valid in counts)
    if not total:
        raise UserError("none of the test images can be read: check --data")
    return 100 * sum(found for found, _ in counts) / total


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _train_step(
    net: Forward, variables: Any, heads: Heads, momentum: Heads, batch: dict[str, jax.Array], rates: jax.Array
) -> tuple[Heads, Heads]:
    inputs = _inputs(net, tuple(heads), variables, batch["image"])
    weight = batch["valid"] / jnp.maximum(jnp.sum(batch["valid"]), 1)  # [B]

    def loss(heads):
        logits = logits_of(heads, inputs)  # [heads, B, K]
        labels = jnp.broadcast_to(jnp.maximum(batch["label"], 0), logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [heads, B]
        return jnp.sum(losses @ weight)  # the heads share no parameters, so the sum trains each separately

    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, jax.grad(loss)(heads))
    move = lambda p, m: p - rates.reshape(-1, *[1] * (p.ndim - 1)) * m  # noqa: E731
    return jax.tree.map(move, heads, momentum), momentum


@functools.partial(jax.jit, static_argnums=0)
def _test_step(net: Forward, variables: Any, heads: Heads, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits = logits_of(heads, _inputs(net, tuple(heads), variables, batch["image"]))  # [heads, B, K]
    return hits(logits, batch["label"], batch["valid"]), jnp.sum(batch["valid"])


def _inputs(net: Forward, choices: tuple[str, ...], variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Head inputs [B, F] for every choice, from one forward pass over uint8 [B, h, w, C]."""
    wanted = {choice: parse_choice(choice) for choice in choices}
    view = Pooled(max(n for n, _ in wanted.values()))
    pooled = net(variables, images, view)
    return {choice: linear_input(pooled, n, avgpool) for choice, (n, avgpool) in wanted.items()}


def logits_of(heads: Heads, inputs: dict[str, jax.Array]) -> jax.Array:
    """Logits [heads, B, K], ordered by choice, then learning rate."""
    logits = [
        jnp.einsum("bf,lfk->lbk", inputs[choice], head["kernel"], precision="highest") + head["bias"][:, None]
        for choice, head in heads.items()
    ]
    return jnp.concatenate(logits)


def hits(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Counts of valid rows with the label in the top 1 and top 5: [heads, B, K] -> [2, heads]."""
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[None, :, None], axis=2)
    rank = jnp.sum(logits > own, axis=2)  # [heads, B]
    return jnp.stack([jnp.sum((rank < depth) & valid, axis=1) for depth in (1, 5)])


def _file_name(model: Model, config: ConfigDict, classes: int, examples: int) -> str:
    settings = sorted({**config.to_dict(), "threads": 0}.items())
    key = f"{settings} {classes} {examples} {fingerprint(model)}"
    return f"linear-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _save(path: epath.Path, epoch: int, heads: Heads, momentum: Heads, history: list[np.ndarray]) -> None:
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((heads, momentum)))}
    save_arrays(path, epoch=np.array(epoch), history=np.stack(history), **leaves)


def _restore(path: epath.Path | None, heads: Heads, momentum: Heads) -> tuple[int, Heads, Heads, list[np.ndarray]]:
    """Epochs done, heads, momentum and scores so far, from an interrupted run if any."""
    if path is None or not path.exists():
        return 0, heads, momentum, []
    leaves, structure = jax.tree.flatten((heads, momentum))
    shapes = {f"leaf_{i}": ("f", leaf.ndim) for i, leaf in enumerate(leaves)}
    saved = load_arrays(path, {"epoch": ("i", 0), "history": ("f", 3), **shapes})
    if any(saved[f"leaf_{i}"].shape != leaf.shape for i, leaf in enumerate(leaves)):
        raise UserError(f"{path}: its heads have other shapes: remove the file")
    heads, momentum = jax.tree.unflatten(structure, [saved[f"leaf_{i}"] for i in range(len(leaves))])
    return int(saved["epoch"]), heads, momentum, list(saved["history"])


def _test_released(model: Model, test: Source, config: ConfigDict) -> dict[str, Any]:
    """Figures of a released head; its width determines its choice of features."""
    kernel, bias = read_head(config.head)
    fitting = [choice for choice, width in widths(model, config).items() if width == len(kernel)]
    if len(fitting) != 1:
        raise UserError(
            f"{config.head}: its {len(kernel)} inputs fit {len(fitting)} of the choices of features (with widths) "
            f"{widths(model, config)}: set --config.features to the one it was trained on"
        )
    top1, top5 = score(model, test, {fitting[0]: {"kernel": kernel[None], "bias": bias[None]}}, config)[:, 0]
    return {"top1": float(top1), "top5": float(top5), "head": fitting[0], "selection": "released head"}


def read_head(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [F, K] and bias [K] of an official linear head (`state_dict` with `linear.weight` and `linear.bias`).

    `path`: a `.pth`, or a released model's name (its head is downloaded once).
    """
    content = read_pth(fetch(path, head=True) if path in PRETRAINED else path)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = tensors if is_tensors(tensors) else {}
    found = {key.rpartition("linear.")[2]: value for key, value in tensors.items() if "linear." in key}
    if (
        set(found) != {"weight", "bias"}
        or found["weight"].ndim != 2
        or found["bias"].shape != found["weight"].shape[:1]
    ):
        raise UserError(f"{path}: not a linear head: it lacks linear.weight and linear.bias")
    return np.asarray(found["weight"], np.float32).T, np.asarray(found["bias"], np.float32)
