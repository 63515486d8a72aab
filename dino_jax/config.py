"""Every configuration key of a training run: default, meaning, bounds.

`default()` is the paper's ViT-S/16 run of 100 epochs. A file in `configs/` changes a few of its values:

    from dino_jax.config import default

    def get_config():
        config = default()
        config.epochs = 300
        return config

`run.*` (mesh, workers, logging, checkpoints, profiling) never changes the mathematics, so it may change when a run
resumes. Any other change is an error.

Sources: the paper (arXiv 2104.14294) and the command-line defaults of the official `main_dino.py`.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

LARGEST = 2**31 - 1  # devices count in int32
MOST_PIXELS = 16384  # of a side
MOST_READERS = 1024  # threads or processes


class Key(NamedTuple):
    """One configuration key. Checks, `--help` and documentation are derived from it."""

    default: Any  # a value, or a type: unset (None) until given a value of that type
    meaning: str
    within: str = ""  # an interval such as "[0, 1)" for the value, or each value of a tuple
    choices: tuple[str, ...] = ()
    ordered: bool = False  # a pair: low, then high
    most: int = LARGEST  # for integers without an upper bound in `within`

    def error(self, value: Any) -> str | None:
        """What is wrong with a value ("must be at least 1"), or None. A key whose default is a type may be None."""
        if value is None and isinstance(self.default, type):
            return None
        several = isinstance(self.default, tuple)
        if several and not isinstance(value, tuple):
            return f"a tuple is needed, such as {self.default}"
        if several and self.default and not value:
            return "must hold at least one value"
        values: tuple[Any, ...] = value if several else (value,)
        if not all(_is(x, self.kinds) for x in values):
            name = self.kinds[0].__name__
            return (
                f"{name} values are needed, such as {self.default}" if several else f"a value of type {name} is needed"
            )
        if found := next(filter(None, map(self._outside, values)), None):
            return found
        if self.ordered and (len(values) != 2 or values[0] > values[1]):
            return "low, then high: swap them" if len(values) == 2 else "two values are needed, low, then high"
        return None

    @property
    def kinds(self) -> tuple[type, ...]:
        """The types of the value, or of each value of a tuple; an int passes for a float."""
        if isinstance(self.default, tuple):
            return (type(self.default[0]),) if self.default else (str, int, float)
        return (self.default if isinstance(self.default, type) else type(self.default),)

    def _outside(self, x: Any) -> str | None:
        """What is wrong with one value of the right type."""
        if isinstance(x, str):
            if not x and self.default != "":
                return "must not be empty"
            return f"must be one of {', '.join(self.choices)}" if self.choices and x not in self.choices else None
        if isinstance(x, float):
            x = ctypes.c_float(x).value  # what a device computes with
            if not math.isfinite(x):
                return "must be finite"
        if self.within and not _inside(x, self.within):
            return f"must be {in_words(self.within)}"
        if isinstance(x, int) and not (self.within and math.isfinite(_parts(self.within)[2])) and abs(x) > self.most:
            return f"must be at most {self.most}"
        return None


class Rule(NamedTuple):
    """A relation between keys that each have a valid value."""

    keys: tuple[str, ...]
    broken: Callable[..., bool]  # takes their values
    meaning: str  # what is wrong, and the fix
    refused: bool = True  # False: only a warning


Keys = Mapping[str, "Key | Keys"]  # groups nest

KEYS: Keys = {
    "seed": Key(0, "random seed; every draw is a function of it and the position in the data", "[0, 4294967295]"),
    "epochs": Key(100, "passes over the data; one is N // batch_size steps", "[1, inf)"),
    "batch_size": Key(1024, "images per step, over all devices", "[1, inf)"),
    "init_from": Key(str, "start from these weights: a run, a checkpoint, a weight file or a released name"),
    "model": {
        "name": Key("vit_small", "backbone: a key of dino_jax.models.BACKBONES"),
        "patch_size": Key(16, "pixels; must divide both crop sizes (ViT, XCiT)", "[1, inf)", most=MOST_PIXELS),
        "in_chans": Key(3, "channels of the input images", "[1, inf)", most=65536),
        "embed_dim": Key(int, "width D; unset: the named model's (ViT, XCiT)", "[1, inf)", most=65536),
        "depth": Key(int, "number of blocks; unset: the named model's (ViT, XCiT)", "[1, inf)", most=1024),
        "heads": Key(
            int, "attention heads, a divisor of D; unset: the named model's (ViT, XCiT)", "[1, inf)", most=65536
        ),
        "init_std": Key(
            float, "initial deviation of the blocks' linear layers; unset: 0.02, too small for a narrow ViT", "(0, inf)"
        ),
        "registers": Key(
            0, "learned tokens next to CLS and the patches, without positions (ViT)", "[0, inf)", most=4096
        ),
        "ffn": Key(
            str,
            "MLP of the blocks; unset: the named model's (ViT; swiglu: DINOv2's giant, DINOv3's S+, H+, 7B)",
            choices=("mlp", "swiglu"),
        ),
        "ffn_dim": Key(int, "its hidden width; unset: the named model's, else 4 D, or with swiglu 8 D / 3", "[1, inf)"),
        "layer_scale": Key(
            float, "initial gain of every residual branch; unset: none (ViT; DINOv2 and DINOv3: 1e-5)", "(0, inf)"
        ),
        "positions": Key(
            str,
            "offset or antialias: a table, resized as in DINO and DINOv2, or as in DINOv2 with registers; rope: rotary "
            "embeddings, DINOv3's; unset: offset (ViT)",
            choices=("offset", "antialias", "rope"),
        ),
        "qkv_bias": Key(
            str,
            "which of queries, keys and values have a bias; unset: qkv (ViT; DINOv3: qv)",
            choices=("qkv", "qv", "none"),
        ),
        "norm_eps": Key(float, "added to the variance in LayerNorm; unset: 1e-6 (ViT; DINOv3: 1e-5)", "(0, inf)"),
        "masking": Key(False, "learn a token that replaces masked patches (ViT; iBOT, DINOv2, DINOv3)"),
        "small_stem": Key(
            False, "start with a 3 x 3 convolution and no pooling, for images of about 32 pixels (ResNet)"
        ),
        "drop_path": Key(
            0.1, "stochastic depth rate of the last block, rising linearly from 0; student only", "[0, 1)"
        ),
        "dtype": Key(
            "float32",
            "compute type; parameters, norms, softmax and loss stay at float32 or wider",
            choices=("float32", "bfloat16", "float64"),
        ),
        "precision": Key(
            "default",
            "matmul precision (default: bfloat16 passes on TPU, TF32 on NVIDIA)",
            choices=("default", "high", "highest"),
        ),
    },
    "head": {
        "out_dim": Key(65536, "K, the number of prototypes", "[2, inf)"),
        "hidden_dim": Key(2048, "width of the MLP's hidden layers", "[1, inf)", most=65536),
        "bottleneck_dim": Key(256, "width of the MLP's output, which is L2-normalized", "[1, inf)", most=65536),
        "layers": Key(3, "linear layers of the MLP before the prototypes", "[1, inf)", most=1024),
        "use_bn": Key(False, "batch norm after each hidden linear layer"),
        "norm_last_layer": Key(True, "keep the gain of the weight-normed last layer at 1; False: train it"),
    },
    "crops": {
        "global_size": Key(
            (224, 224),
            "height, width in pixels; one integer on the command line sets both",
            "[1, inf)",
            most=MOST_PIXELS,
        ),
        "local_size": Key((96, 96), "height, width in pixels", "[1, inf)", most=MOST_PIXELS),
        "local_count": Key(8, "local crops per image, besides the 2 global ones", "[0, inf)", most=1024),
        "global_scale": Key((0.4, 1.0), "share of the image's area, low and high", "(0, 1]", ordered=True),
        "local_scale": Key((0.05, 0.4), "share of the image's area, low and high", "(0, 1]", ordered=True),
        "ratio": Key(
            (3 / 4, 4 / 3), "aspect ratio (width / height), log-uniform, low and high", "(0, inf)", ordered=True
        ),
        "flip_prob": Key(0.5, "probability of a horizontal flip", "[0, 1]"),
        "jitter_prob": Key(0.8, "probability of color jitter (four operations in random order)", "[0, 1]"),
        "brightness": Key(0.4, "jitter factor uniform in 1 +- this", "[0, inf)"),
        "contrast": Key(0.4, "jitter factor uniform in 1 +- this", "[0, inf)"),
        "saturation": Key(0.2, "jitter factor uniform in 1 +- this", "[0, inf)"),
        "hue": Key(0.1, "hue shift uniform in +- this, in turns of the color wheel", "[0, 0.5]"),
        "gray_prob": Key(0.2, "probability of conversion to gray", "[0, 1]"),
        "blur_prob": Key((1.0, 0.1, 0.5), "probability for first global, second global, local crops", "[0, 1]"),
        "blur_radius": Key(
            (0.1, 2.0), "radius of PIL's GaussianBlur in pixels, low and high", "[0, inf)", ordered=True
        ),
        "solarize_prob": Key((0.0, 0.2, 0.0), "probability for first global, second global, local crops", "[0, 1]"),
        "solarize_threshold": Key(128, "values at or above this (of 255) are inverted", "[0, 256]"),
    },
    "data": {
        "train": Key("scenes:train?size=20000", "a source, e.g. /data/imagenet/train, tfds:imagenet2012:train"),
        "mean": Key((0.485, 0.456, 0.406), "mean of each channel, for pixel values in 0..1 (ImageNet)"),
        "std": Key((0.229, 0.224, 0.225), "deviation of each channel, for pixel values in 0..1 (ImageNet)", "(0, inf)"),
        "render": Key("host", "render crops with PIL on the host, or on the device", choices=("host", "device")),
        "canvas": Key(
            512,
            "device rendering: images are shrunk until the longer side is at most this many pixels",
            "[1, inf)",
            most=MOST_PIXELS,
        ),
        "max_bad_share": Key(0.01, "a larger share of unreadable images is an error", "[0, 1]"),
    },
    "optim": {
        "name": Key("adamw", "optimizer", choices=("adamw", "sgd", "lars")),
        "lr": Key(5e-4, "learning rate for 256 images; with lr_scaling=sqrt for 1024", "[0, inf)"),
        "lr_scaling": Key(
            "linear",
            "lr grows with batch_size / 256 (DINO, iBOT), or with the square root of batch_size / 1024 (DINOv2)",
            choices=("linear", "sqrt"),
        ),
        "layer_decay": Key(1.0, "learning rate factor from each block to the one below; 1: the same for all", "(0, 1]"),
        "patch_embed_lr": Key(1.0, "learning rate factor of the patch embedding (DINOv2: 0.2)", "(0, inf)"),
        "min_lr": Key(1e-6, "learning rate at the end of the cosine; not scaled", "[0, inf)"),
        "warmup_epochs": Key(10, "epochs of linear warm-up from 0", "[0, inf)"),
        "weight_decay": Key(0.04, "weight decay at the start of its cosine", "[0, inf)"),
        "weight_decay_end": Key(0.4, "weight decay at the end of its cosine", "[0, inf)"),
        "clip_grad": Key(3.0, "maximum norm of the gradient; 0: off", "[0, inf)"),
        "clip_by": Key(
            "tensor",
            "clip each tensor (DINO, iBOT), or backbone and head each as a whole (DINOv2)",
            choices=("tensor", "module"),
        ),
        "freeze_last_layer": Key(1, "first epochs, in which the prototypes are not updated", "[0, inf)"),
        "freeze_by": Key(
            "gradient",
            "frozen prototypes have no gradient (DINO, iBOT), or a learning rate of 0 while moments move (DINOv2)",
            choices=("gradient", "lr"),
        ),
        "momentum": Key(0.9, "momentum of SGD and LARS", "[0, 1)"),
        "b1": Key(0.9, "AdamW: decay of the first moment", "[0, 1)"),
        "b2": Key(0.999, "AdamW: decay of the second moment", "[0, 1)"),
        "eps": Key(1e-8, "AdamW: added to the denominator", "[0, inf)"),
    },
    "teacher": {
        "momentum": Key(
            0.996, "EMA momentum at the start of its cosine (0.9995 suggested for a batch of 256)", "[0, 1]"
        ),
        "momentum_end": Key(1.0, "EMA momentum at the end of its cosine", "[0, 1]"),
        "temp": Key(0.04, "softmax temperature after its warm-up", "(0, inf)"),
        "warmup_temp": Key(0.04, "softmax temperature at the start of its linear warm-up", "(0, inf)"),
        "warmup_temp_epochs": Key(0, "epochs of the temperature's warm-up", "[0, inf)"),
        "warmup_temp_by": Key(
            "epoch",
            "the temperature rises with every epoch (DINO, iBOT), or with every step (DINOv2)",
            choices=("epoch", "step"),
        ),
    },
    "objective": {  # each group with a weight is a module of dino_jax.objectives
        "dino": {
            "weight": Key(1.0, "weight of the DINO loss in the total loss; 0: off", "[0, inf)"),
            "student_temp": Key(0.1, "softmax temperature of the student", "(0, inf)"),
            "centering": Key(
                "ema",
                "what keeps the teacher from collapse: a moving center (DINO) or Sinkhorn-Knopp (DINOv2)",
                choices=("ema", "sinkhorn"),
            ),
            "center_momentum": Key(0.9, "EMA momentum of the center", "[0, 1]"),
        },
        "koleo": {
            "weight": Key(
                0.0, "weight of the KoLeo loss, which spreads CLS features (DINOv2: 0.1); 0: off", "[0, inf)"
            ),
        },
        "ibot": {
            "weight": Key(0.0, "weight of the masked patches' loss; 0: off (needs model.masking=True)", "[0, inf)"),
            "student_temp": Key(0.1, "softmax temperature of the student", "(0, inf)"),
            "temp": Key(float, "softmax temperature of the teacher; unset: teacher.temp", "(0, inf)"),
            "warmup_temp": Key(float, "the same at the start of its warm-up; unset: teacher.warmup_temp", "(0, inf)"),
            "centering": Key("ema", "a moving center (iBOT) or Sinkhorn-Knopp (DINOv2)", choices=("ema", "sinkhorn")),
            "center_momentum": Key(0.9, "EMA momentum of the center", "[0, 1]"),
            "center_over": Key(
                "masked", "the center follows the masked patches (DINOv2) or all (iBOT)", choices=("masked", "all")
            ),
            "shared_head": Key(True, "patches are read by the head of CLS; False: by a head of their own"),
            "out_dim": Key(int, "prototypes of the patches' own head; unset: head.out_dim", "[2, inf)"),
            "hidden_dim": Key(int, "its hidden width; unset: head.hidden_dim", "[1, inf)"),
            "bottleneck_dim": Key(int, "its bottleneck; unset: head.bottleneck_dim", "[1, inf)"),
            "layers": Key(int, "its linear layers; unset: head.layers", "[1, inf)"),
            "mask_prob": Key(0.5, "share of the global crops that have a mask", "(0, 1]"),
            "mask_ratio": Key(
                (0.1, 0.5), "share of a crop's patches that are masked, low and high", "(0, 1)", ordered=True
            ),
            "mask_shape": Key(
                "block",
                "rectangles of 4 patches and more (DINOv2), of a ninth of the grid and more (iBOT), or single patches",
                choices=("block", "large_block", "random"),
            ),
            "mask_spread": Key(
                True, "spread masks and ratios evenly over each group of images (DINOv2); False: every crop by itself"
            ),
            "group": Key(16, "images in such a group; must divide those of a device and microbatch", "[1, inf)"),
            "start_epoch": Key(0, "epochs before this have no masks", "[0, inf)"),
        },
    },
    "eval": {
        "knn_every": Key(0, "epochs between k-NN evaluations of the teacher; 0: never", "[0, inf)"),
        "knn_train": Key(str, "labeled source of the neighbors"),
        "knn_test": Key(str, "labeled source of the queries"),
        "knn_k": Key(20, "number of neighbors", "[1, inf)"),
        "knn_temperature": Key(0.07, "temperature of the neighbors' votes", "(0, inf)"),
        "voc_every": Key(0, "epochs between evaluations of the teacher's attention Jaccard; 0: never", "[0, inf)"),
        "voc_data": Key(str, "images with object masks: a VOC folder, scenes:..., or a folder with images/ and masks/"),
        "voc_size": Key(
            480, "voc_data: side of the square that images are resized to, in pixels", "[1, inf)", most=MOST_PIXELS
        ),
        "resize": Key(
            256, "k-NN: shorter side before the center crop, bicubic; 0: no resize", "[0, inf)", most=MOST_PIXELS
        ),
        "crop": Key(224, "k-NN: side of the center crop", "[1, inf)", most=MOST_PIXELS),
        "batch_size": Key(256, "k-NN: images per batch", "[1, inf)"),
    },
    "run": {
        "mesh": {
            "data": Key(-1, "devices over which the batch is split; -1: all remaining", "[-1, 65536]"),
            "fsdp": Key(
                1,
                "devices over which batch, parameters and optimizer state are split; -1: all remaining",
                "[-1, 65536]",
            ),
            "model": Key(1, "devices over which the prototypes are split; -1: all remaining", "[-1, 65536]"),
        },
        "accum_steps": Key(1, "microbatches per step", "[1, inf)"),
        "remat": Key("none", "blocks: recompute each block in the backward pass", choices=("none", "blocks")),
        "attention": Key(
            "auto",
            "fused: cuDNN's (NVIDIA, bfloat16); auto: fused if possible (ViT)",
            choices=("auto", "plain", "fused"),
        ),
        "workers": Key(0, "reading processes; 0: threads of this process", "[0, inf)", most=MOST_READERS),
        "threads": Key(2, "reading threads in each process", "[1, inf)", most=MOST_READERS),
        "prefetch": Key(2, "batches ready on the device ahead of the step", "[0, inf)", most=1024),
        "log_every": Key(10, "steps between log entries", "[1, inf)"),
        "checkpoint_every": Key(1.0, "epochs between checkpoints; fractions are allowed", "(0, inf)"),
        "keep": Key(2, "latest checkpoints kept", "[1, inf)"),
        "keep_every": Key(20, "epochs between checkpoints that are kept for good; 0: none", "[0, inf)"),
        "async_checkpoint": Key(True, "write checkpoints in the background"),
        "stall_timeout": Key(600.0, "seconds to wait for input until the run ends; 0: forever", "[0, inf)"),
        "profile_steps": Key((0, 0), "first and last step of an xprof trace; equal: no trace", "[0, inf)"),
        "tensorboard": Key(True, "write TensorBoard files"),
        "wandb": Key("", "Weights & Biases project; empty: off"),
        "progress": Key(True, "show a progress bar with an ETA on stderr"),
        "accept_new_data": Key(
            False, "resume although data.train has changed; epochs and schedules follow its new number of images"
        ),
        "max_bad_steps": Key(3, "non-finite losses in a row before going back to the last good checkpoint", "[1, inf)"),
        "max_rewinds": Key(2, "returns to a checkpoint before the run stops with a reason", "[0, inf)"),
        "stop_after": Key(0, "stop cleanly after this many steps of this session; 0: off", "[0, inf)"),
    },
}


def lr_scale(batch_size: int, how: str) -> float:
    """The factor by which a batch scales the learning rate; `how`: `optim.lr_scaling`."""
    return {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size / 1024)}[how]


RULES = (
    Rule(("optim.warmup_epochs", "epochs"), lambda warmup, run: warmup > run, "the warm-up is longer than the run"),
    Rule(
        ("optim.min_lr", "optim.lr", "batch_size", "optim.lr_scaling"),
        lambda low, lr, batch, how: low > lr * lr_scale(batch, how),
        "the rate would rise to the end: optim.min_lr is above the peak, optim.lr scaled with the batch",
    ),
    Rule(
        ("teacher.warmup_temp_epochs", "epochs", "teacher.warmup_temp", "teacher.temp"),
        lambda warmup, run, first, last: warmup > run and first != last,
        "the temperature's warm-up is longer than the run, which never reaches teacher.temp",
    ),
    Rule(
        ("optim.freeze_last_layer", "epochs"),
        lambda frozen, run: frozen > run,
        "the prototypes are never updated: this counts epochs, not steps",
        refused=False,
    ),
    Rule(
        ("crops.local_size", "crops.global_size", "crops.local_count"),
        lambda local, whole, count: count > 0 and max(local) > max(whole),
        "local crops are larger than global ones",
        refused=False,
    ),
    Rule(
        ("data.canvas", "crops.global_size", "crops.local_size", "data.render"),
        lambda canvas, whole, local, render: render == "device" and canvas < max(*whole, *local),
        "images are shrunk to data.canvas, then enlarged to a crop: raise data.canvas",
    ),
    Rule(
        ("eval.crop", "eval.resize", "eval.knn_every"),
        lambda crop, resize, every: every > 0 and 0 < resize < crop,
        "each image would get a black frame: lower eval.crop or raise eval.resize",
    ),
    Rule(("data.mean",), lambda mean: min(mean) < 0 or max(mean) > 1, "pixel values are in 0..1: divide by 255"),
    Rule(("data.std",), lambda std: max(std) > 1, "pixel values are in 0..1: divide by 255"),
    Rule(("run.profile_steps",), lambda steps: steps[0] > steps[1], "the first step and the last one are needed"),
    Rule(
        ("run.mesh.data", "run.mesh.fsdp", "run.mesh.model"),
        lambda *axes: 0 in axes,
        "an axis cannot have 0 devices; use 1, or -1 for the rest",
    ),
)


def default() -> ConfigDict:
    """The defaults of the official code, as a locked `ConfigDict` with every key."""
    return build(KEYS)


def build(keys: Keys) -> ConfigDict:
    """A locked `ConfigDict` with the defaults of `keys`."""
    config = ConfigDict()
    for name, key in keys.items():
        if not isinstance(key, Key):
            config[name] = build(key)
        else:
            config[name] = placeholder(key.default) if isinstance(key.default, type) else key.default
    return config.lock()


def flat_keys(keys: Keys = KEYS, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """`("optim.lr", Key(...))` for every key, in order of declaration."""
    for name, key in keys.items():
        if isinstance(key, Key):
            yield prefix + name, key
        else:
            yield from flat_keys(key, f"{prefix}{name}.")


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value has one of these types; an int passes for a float, but a bool not for a number."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


_INTERVAL = re.compile(r"([\[(])([-\w.]+), ([-\w.]+)([\])])")


def _parts(interval: str) -> tuple[str, float, float, str]:
    found = _INTERVAL.fullmatch(interval)
    if found is None:
        raise ValueError(f"{interval!r} is not an interval such as [0, 1)")
    return found[1], float(found[2]), float(found[3]), found[4]


def _inside(value: Any, interval: str) -> bool:
    opens, low, high, closes = _parts(interval)
    above = value >= low if opens == "[" else value > low
    return above and (value <= high if closes == "]" else value < high)


def in_words(interval: str) -> str:
    """`[0, 1)` -> `at least 0 and less than 1`."""
    opens, low, high, closes = _parts(interval)
    if opens == "[" and closes == "]":
        return f"between {low:.10g} and {high:.10g}"
    words = [f"{'at least' if opens == '[' else 'greater than'} {low:.10g}"]
    if math.isfinite(high):
        words.append(f"{'at most' if closes == ']' else 'less than'} {high:.10g}")
    return " and ".join(words)
