"""Fine-tuning of the whole network with the recipe of DeiT (paper table 6).

Hyper-parameters are from the authors' answers in issues 31, 81, 144 and 171 of the official repository. Variants for
CIFAR, Flowers, Cars and iNaturalist: `configs/finetune`. The recipe is AdamW with warm-up and cosine, label smoothing,
mixup or CutMix, RandAugment, random erasing, stochastic depth and repeated augmentation; layer-wise learning rates and
weight averaging (EMA) are optional.

Legend: B batch, D width, K classes.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.data.sources import Source
from dino_jax.errors import UserError
from dino_jax.eval.augment import draw_mix, erase, mix_batch, rand_augment, smoothed
from dino_jax.eval.batches import crop_and_flip, data_mesh, test_batches, train_batches
from dino_jax.eval.protocol import CROP, RESIZE, SEED, THREADS, Protocol
from dino_jax.eval.protocols.linear import hits
from dino_jax.eval.splits import CLASSES, class_count, open_splits
from dino_jax.inference.model import Forward, Model
from dino_jax.models.backbone import layers_of
from dino_jax.parallel.sharding import replicated
from dino_jax.weights.checkpoint import Checkpointer, restore_config

_log = logging.getLogger(__name__)

KEYS = {
    "epochs": Key(300, "passes over the training images", "[1, inf)"),
    "batch_size": Key(1024, "images per step, over all devices", "[1, inf)"),
    "lr": Key(5e-4, "learning rate for 512 images; scaled by batch_size / 512", "(0, inf)"),
    "warmup_epochs": Key(5, "epochs of linear warm-up", "[0, inf)"),
    "warmup_lr": Key(1e-6, "learning rate at the start of the warm-up; not scaled", "[0, inf)"),
    "min_lr": Key(1e-5, "learning rate at the end of the cosine; not scaled", "[0, inf)"),
    "weight_decay": Key(0.05, "for matrices only, not biases, norms, CLS, registers and positions", "[0, inf)"),
    "layer_decay": Key(1.0, "learning rate factor from each block to the one below; 1: the same for all", "(0, inf)"),
    "head_scale": Key(0.001, "scale of the new head's initial weights N(0, 0.02) (issue 31)", "[0, inf)"),
    "drop_path": Key(0.1, "stochastic depth rate of the last block (XCiT: of every block)", "[0, 1)"),
    "smoothing": Key(0.1, "label smoothing", "[0, 1]"),
    "mixup": Key(0.8, "alpha of the beta distribution; 0: off", "[0, inf)"),
    "cutmix": Key(1.0, "alpha of the beta distribution; 0: off. With mixup on too, each batch draws one", "[0, inf)"),
    "magnitude": Key(9.0, "strength of RandAugment's two operations, out of 10; 0: off", "[0, inf)"),
    "erasing": Key(0.25, "probability of random erasing", "[0, 1]"),
    "repeats": Key(
        3,
        "augmentations per image in an epoch, which then holds 1 / repeats of the images",
        "[1, inf)",
    ),
    "ema": Key(0.0, "momentum of a weight average, which is also tested, e.g. 0.99996; 0: off", "[0, 1)"),
    "size": Key(224, "side of training crops", "[1, inf)", most=MOST_PIXELS),
    "resize": RESIZE,
    "crop": CROP,
    "eval_every": Key(1, "epochs between evaluations", "[1, inf)"),
    "seed": SEED,
    "threads": THREADS,
}


class State(NamedTuple):
    """The training state."""

    params: Any  # {"backbone": ..., "head": {"kernel" [D, K], "bias" [K]}}
    batch_stats: Any
    opt_state: Any
    ema: Any  # parameters, or {} if off
    step: jax.Array


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`top1` and `top5` in percent after the last epoch, `top1_best` over epochs, `top1_ema` of the weight average.

    `data` is as in `splits.train_test`. With a `workdir`, the state is saved in `finetune/` there, and an interrupted
    run resumes.
    """
    _, train, _, test = open_splits(data)
    classes = class_count(train, test, data)
    steps = len(train) // config.batch_size
    if not steps:
        raise UserError(f"--config.batch_size={config.batch_size} exceeds the {len(train)} training images: lower it")
    optimizer = make_optimizer(config, steps)
    state = init(model, config, classes, optimizer)
    step = make_step(model.forward, config, classes, optimizer)
    keeper = _Keeper(workdir, config)
    epoch, best, state = keeper.restore(state)
    figures: dict[str, float] = {}
    while epoch < config.epochs or not figures:
        if epoch < config.epochs:
            state = _train_epoch(model, train, config, epoch, step, state)
            epoch += 1
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            figures = _test(model, test, config, state)
            best = max(best, figures["top1"])
            _log.info("epoch %d: %s", epoch, figures)
            keeper.save(epoch, best, state)
    keeper.close()
    return figures | {"top1_best": best}


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=CLASSES,
    whole_patches=("size", "crop"),
    published={"top1": {"S/16": 81.5, "B/16": 82.8}},
    source="ImageNet; the paper, table 6, which has for C10, C100, iNaturalist 18 and 19, Flowers, Cars: "
    "S/16 99.0 90.5 72.0 78.2 98.5 93.0, B/16 99.1 91.7 72.6 78.6 98.8 93.0",
    order=None,  # it trains the whole network for days
)


def init(model: Model, config: ConfigDict, classes: int, optimizer: optax.GradientTransformation) -> State:
    """Initial state: the pretrained backbone with a new head, replicated on all devices."""
    shape = jax.ShapeDtypeStruct((1, config.size, config.size, len(model.mean)), jnp.float32)
    width = jax.eval_shape(model.backbone.apply, model.variables, shape).shape[-1]
    rng = np.random.default_rng(config.seed)
    kernel = rng.normal(0, 0.02 * config.head_scale, (width, classes)).astype(np.float32)
    head = {"kernel": kernel, "bias": np.zeros(classes, np.float32)}
    params = {"backbone": model.variables["params"], "head": head}
    stats = model.variables.get("batch_stats", {})
    params, stats = jax.tree.map(jnp.array, (params, stats))  # copy, as the state is donated
    ema = jax.tree.map(jnp.copy, params) if config.ema else {}
    state = State(params, stats, optimizer.init(params), ema, jnp.zeros((), jnp.int32))
    return jax.device_put(state, replicated(data_mesh()))


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and layer-wise learning rates; `steps` per epoch."""
    peak, warmup = config.lr * config.batch_size / 512, config.warmup_epochs * steps
    total = max(config.epochs * steps, warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(config.warmup_lr, peak, warmup, total, config.min_lr)

    def scales(params):
        layers = layers_of(params)
        top = max(jax.tree.leaves(layers))
        return jax.tree.map(lambda layer: config.layer_decay ** (top - layer), layers)

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, params: jax.tree.map(lambda u, s: u * s, updates, scales(params))),
        optax.scale_by_learning_rate(schedule),
    )


def decayed(params: Any) -> Any:
    """Which parameters are decayed: matrices and kernels, except CLS, registers and positions."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and not re.search(r"_token|pos_embed", _name(path)), params
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _train_epoch(
    model: Model, train: Source, config: ConfigDict, epoch: int, step: Callable[..., State], state: State
) -> State:
    batches = train_batches(
        train,
        functools.partial(augmented, config=config),
        data_mesh(),
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        channels=len(model.mean),
        threads=config.threads,
        repeats=config.repeats,
    )
    whole = len(train) // config.batch_size  # drop the last partial batch
    for number, batch in enumerate(itertools.islice(batches, whole)):
        rng = np.random.default_rng((config.seed, epoch, number))
        state = step(state, batch, draw_mix(rng, config.size, config.size, config.mixup, config.cutmix))
    return state


def augmented(pixels: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """A training view uint8 [S, S, C]: random crop (bicubic), flip, RandAugment."""
    view = crop_and_flip(pixels, rng, config.size, how=Image.Resampling.BICUBIC)
    return rand_augment(view, rng, config.magnitude) if config.magnitude else view


def make_step(
    net: Forward, config: ConfigDict, classes: int, optimizer: optax.GradientTransformation
) -> Callable[[State, dict, Any], State]:
    """The jitted training step, which donates the state."""
    root = jax.random.key(config.seed)

    def step(state: State, batch: dict[str, jax.Array], mix: Any) -> State:
        noise, paths = jax.random.split(jax.random.fold_in(root, state.step))
        images = erase(noise, net.normalize(batch["image"]), config.erasing)
        targets = smoothed(batch["label"], classes, config.smoothing)
        images, targets = mix_batch(images, targets, batch["valid"], mix)
        weight = batch["valid"] / jnp.maximum(jnp.sum(batch["valid"]), 1)

        def loss(params):
            logits, stats = forward(net, params, state.batch_stats, images, drop_path(paths, net, len(images), config))
            return jnp.sum(optax.softmax_cross_entropy(logits, targets) * weight), stats

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - config.ema) if config.ema else {}
        return State(params, stats, opt_state, ema, state.step + 1)

    return jax.jit(step, donate_argnums=0)


def drop_path(key: jax.Array, net: Forward, batch: int, config: ConfigDict) -> jax.Array | None:
    """Drop-path factors [depth, branches, B], 0 or 1 / keep, at the backbone's rates; None if all rates are 0."""
    rates = net.backbone.drop_rates(config.drop_path)
    if not rates.any():
        return None
    keep = 1 - jnp.asarray(rates, jnp.float32)[..., None]
    return jax.random.bernoulli(key, keep, (*rates.shape, batch)) / keep


def forward(
    net: Forward, params: Any, batch_stats: Any, images: jax.Array, paths: jax.Array | None, train: bool = True
) -> tuple[jax.Array, Any]:
    """Class scores [B, K] of normalized images, and the updated batch statistics."""
    variables = {"params": params["backbone"], "batch_stats": batch_stats}
    mutable = ["batch_stats"] if train else []
    features, changed = net.backbone.apply(variables, images, paths, train, mutable=mutable)
    logits = features.astype(jnp.float32) @ params["head"]["kernel"] + params["head"]["bias"]
    return logits, changed.get("batch_stats", batch_stats)


@functools.partial(jax.jit, static_argnums=0)
def _test_step(net: Forward, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    images = net.normalize(batch["image"])
    logits, _ = forward(net, params, batch_stats, images, None, train=False)
    return hits(logits[None], batch["label"], batch["valid"])[:, 0], jnp.sum(batch["valid"])


def _test(model: Model, test: Source, config: ConfigDict, state: State) -> dict[str, float]:
    found: dict[str, np.ndarray] = {"": np.zeros(2)} | ({"_ema": np.zeros(2)} if config.ema else {})
    total = 0
    for batch in test_batches(test, config, data_mesh(), len(model.mean)):
        for name in found:
            params = state.ema if name else state.params
            right, valid = jax.device_get(_test_step(model.forward, params, state.batch_stats, batch))
            found[name] = found[name] + right
        total += int(valid)
    if not total:
        raise UserError("none of the test images can be read: check --data")
    return {f"top{n}{name}": 100 * float(v[i]) / total for name, v in found.items() for i, n in enumerate((1, 5))}


class _Keeper:
    """Saves and restores the state; does nothing without a workdir."""

    def __init__(self, workdir: str | None, config: ConfigDict):
        self.config = json.dumps({**config.to_dict(), "threads": 0}, sort_keys=True)
        self.checkpointer = None if workdir is None else Checkpointer(epath.Path(workdir) / "finetune")

    def restore(self, state: State) -> tuple[int, float, State]:
        """Epochs done, best top-1 and state; initial ones if there is no checkpoint."""
        if self.checkpointer is None or (last := self.checkpointer.latest_step()) is None:
            return 0, 0.0, state
        directory = self.checkpointer.directory
        saved = json.dumps(json.loads(restore_config(directory, last)), sort_keys=True)
        if saved != self.config:
            raise UserError(f"{directory}: has a run with other settings: use another --workdir or remove it")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = {"state": shapes, "best": {"top1": jax.ShapeDtypeStruct((), np.float64)}}
        found = self.checkpointer.restore(last, items)
        return last, float(found["best"]["top1"]), found["state"]

    def save(self, epoch: int, best: float, state: State) -> None:
        """Saves the state, replacing the previous one."""
        if self.checkpointer is not None:
            self.checkpointer.save(epoch, {"state": state, "best": {"top1": np.float64(best)}}, self.config)

    def close(self) -> None:
        """Waits for pending writes."""
        if self.checkpointer is not None:
            self.checkpointer.close()
