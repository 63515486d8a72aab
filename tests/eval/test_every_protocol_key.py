"""Every key of every protocol, changed alone, changes the figures or the work.

The backbone is a mean over patches, and steps that would be compiled are compared as jaxprs.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default, flat_keys
from dino_jax.errors import UserError
from dino_jax.eval import batches, features, protocol
from dino_jax.eval.protocols import copydetection, dense, finetune, knn, linear, lowshot, retrieval, voc, vos
from dino_jax.inference.model import Model
from dino_jax.models.backbone import Backbone, Tokens
from tests.eval.test_by_hand import noise

SCENES = "scenes:val?size=6&image_size=32"
READING = (batches, copydetection, dense, retrieval, voc, vos)  # modules that read images on threads


class Mean(Backbone):
    """Patches are mean colors; CLS is their mean. One linear layer, and drop-path factors scale it."""

    embed_dim: int = 8
    depth: int = 2
    patch_size: int = 4
    heads: int = 2

    def setup(self):
        self.patch_embed = nn.Dense(8)

    def tokens(self, images, n=1):
        rows, columns = images.shape[1] // 4, images.shape[2] // 4
        means = images.reshape(-1, rows, 4, columns, 4, 3).mean((2, 4))
        patches = jnp.repeat(self.patch_embed(means)[None], n, 0)
        return Tokens(patches.mean((2, 3)), patches[:, :, 0, :0], patches)

    def cls_attention(self, images, block=-1):
        return jnp.moveaxis(self.tokens(images).patches[0], -1, 1)

    def __call__(self, images, drop_path=None, train=False):
        cls = self.tokens(images).cls[0]
        return cls if drop_path is None else cls * drop_path.sum((0, 1))[:, None]

    def drop_rates(self, rate):
        return np.full((2, 2), rate)


@pytest.fixture(scope="module")
def mean_model():
    backbone = Mean()
    return Model(default(), backbone.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))), backbone)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sources and folders of noise for every protocol."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("files")
    for name, count in (("train", 30), ("test", 24)):
        np.savez(root / f"{name}.npz", images=noise(rng, count, 20, 24), labels=np.arange(count) % 3)
    for folder in ("days/original", "days/strong", "others", "roxford5k/jpg"):
        (root / folder).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(noise(rng, 1, 28, 28)[0]).save(root / folder / f"200{i}00.jpg")
    names = [f"200{i}00" for i in range(6)]
    truth = [{"bbx": [0.0] * 4, "easy": [i], "hard": [(i + 1) % 6], "junk": []} for i in range(6)]
    gnd = {"imlist": names, "qimlist": names, "gnd": truth}
    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(gnd))
    (root / "list.txt").write_text("\n".join(names))
    return root


def digest(*trees: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(trees))).hexdigest()


def classes(files):
    return f"arrays:{files / 'train.npz'},arrays:{files / 'test.npz'}"


def run_knn(model, files, config, patch, seen):
    return knn.evaluate(model, classes(files), config)


def run_lowshot(model, files, config, patch, seen):
    fit = lowshot.fit_logistic
    patch.setattr(lowshot, "fit_logistic", lambda *a, **o: seen.append((digest(a[:2]), a[2:], o)) or fit(*a, **o))
    return lowshot.evaluate(model, classes(files), config)


def run_linear(model, files, config, patch, seen):
    def step(net, variables, heads, momentum, batch, rates):
        seen.append(digest(heads, batch, rates))
        return heads, momentum

    patch.setattr(linear, "_train_step", step)

    def test(net, variables, heads, batch):
        seen.append(digest(heads, batch))
        count = sum(len(head["bias"]) for head in heads.values())
        return np.zeros((2, count)), batch["valid"].sum()

    patch.setattr(linear, "_test_step", test)
    return linear.evaluate(model, classes(files), config)


def run_finetune(model, files, config, patch, seen):
    make = finetune.make_step

    def recorded(net, config, classes, optimizer):
        def step(state, batch, mix):
            if not seen or not str(seen[-1]).startswith("step"):
                real = make(net, config, classes, optimizer)
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
                closed = jax.make_jaxpr(real.__wrapped__)(*shapes, mix)
                seen.append((str(closed.jaxpr), [str(x) for x in closed.consts]))
            seen.append("step " + digest(state, batch, mix))
            return state

        return step

    patch.setattr(finetune, "make_step", recorded)
    patch.setattr(finetune, "_test_step", lambda net, params, stats, batch: (np.ones(2), batch["valid"].sum()))
    return finetune.evaluate(model, classes(files), config)


def run_vos(model, files, config, patch, seen):
    opened = vos.open_videos

    def recorded(sources, target, labels, valid, **options):
        seen.append((digest(sources, target), sources.shape, valid.tolist(), options))
        return labels[0]

    patch.setattr(vos, "propagate", recorded)
    patch.setattr(vos, "open_videos", lambda data, split, c: seen.append(split) or opened(SCENES, split, c))
    patch.setattr(vos.davis, "score_video", lambda labels, *_: [{m: dict.fromkeys(KINDS, labels.mean()) for m in "JF"}])
    return vos.evaluate(model, SCENES, config)


KINDS = ("mean", "recall", "decay")


def run_copydetection(model, files, config, patch, seen):
    return copydetection.evaluate(model, str(files / "days"), config)


def run_retrieval(model, files, config, patch, seen):
    return retrieval.evaluate(model, str(files), config)


def run_voc(model, files, config, patch, seen):
    opened = voc.open_masks
    patch.setattr(voc, "open_masks", lambda data, split, c: seen.append(split) or opened(data, split, c))
    return voc.evaluate(model, SCENES, config)


def run_dense(model, files, config, patch, seen):
    adamw, placed = dense.optax.adamw, dense.to_devices
    optimizer = lambda lr, **o: seen.append(([float(lr(i)) for i in range(4)], o)) or adamw(lr, **o)  # noqa: E731
    patch.setattr(dense.optax, "adamw", optimizer)
    patch.setattr(dense, "to_devices", lambda batch, *a: seen.append(digest(batch)) or placed(batch, *a))
    patch.setattr(dense, "confusion", lambda *a: np.eye(3))
    return dense.evaluate(model, f"scenes:train?size=6&image_size=32,{SCENES}", config)


def fake_run(seen):
    """`features.run` with the mean colors of patches for features, attention and tokens."""

    def run(model, view, many, **_):
        for batch in many:
            images = np.asarray(batch["image"], np.float32)
            seen.append((str(view), images.shape))
            rows, columns = images.shape[1] // 4, images.shape[2] // 4
            means = images[:, : 4 * rows, : 4 * columns].reshape(-1, rows, 4, columns, 4, 3).mean((2, 4))
            name = type(view).__name__
            cls = {"Patches": means, "ClsAttention": np.moveaxis(means, -1, 1)}
            yield cls.get(name, means.mean((1, 2))), batch

    return run


def recorded_dataset(seen, make):
    return lambda source, **o: seen.append((len(source), o)) or make(source, **{**o, "workers": 0})


def recorded_threads(seen, read):
    return lambda load, items, threads: seen.append(threads) or read(load, items, threads)


BASE = {
    "knn": {"k": (3, 5), "resize": 18, "crop": 16, "batch_size": 8},
    "lowshot": {"shares": (0.5,), "resize": 18, "crop": 16, "batch_size": 8},
    "linear": {"lrs": (0.1, 0.2), "features": ("1", "1+avg"), "resize": 18, "crop": 16, "batch_size": 8, "epochs": 2},
    "finetune": {"resize": 18, "crop": 16, "size": 16, "batch_size": 8, "epochs": 2, "warmup_epochs": 1, "repeats": 1},
    "vos": {"size": 32, "multiple": 8},
    "copydetection": {"size": 16},
    "retrieval": {"size": 24},
    "voc": {"size": 32, "batch_size": 2},
    "dense": {"size": 32, "epochs": 1, "batch_size": 8},
}
VIEW = {"resize": 20, "crop": 12, "batch_size": 16}
SWEEP: dict[str, dict[str, Any]] = {
    "knn": {"k": (4, 5), "temperature": 3.0, **VIEW, "workers": 1},
    "lowshot": {
        "shares": (0.6,), "lists": ("list.txt",), "penalty": 9.0, "tolerance": 1.0, "seed": 1, **VIEW, "workers": 1,
    },
    "linear": {
        "features": ("1",), "lrs": (0.1, 0.3), "epochs": 3, "eval_every": 2, "holdout": 0.3, "head": "absent.pth",
        "seed": 1, "threads": 2, **VIEW,
    },
    "finetune": {
        "epochs": 3, "lr": 1e-3, "warmup_epochs": 0, "warmup_lr": 1e-5, "min_lr": 1e-4, "weight_decay": 0.1,
        "layer_decay": 0.5, "head_scale": 1.0, "drop_path": 0.2, "smoothing": 0.2, "mixup": 0.0, "cutmix": 0.0,
        "magnitude": 0.0, "erasing": 0.5, "repeats": 2, "ema": 0.9, "size": 12, "eval_every": 2, "seed": 1,
        "threads": 2, **VIEW,
    },
    "vos": {
        "size": 40, "multiple": 64, "context": 3, "radius": 3, "topk": 3, "temperature": 0.2, "split": "train",
        "batch_size": 3, "threads": 2,
    },
    "copydetection": {"size": 12, "whitening": "others", "distractors": "others", "batch_size": 4, "threads": 2},
    "retrieval": {"size": 16, "multiscale": True, "batch_size": 4, "threads": 2},
    "voc": {
        "masses": (0.5,), "size": 24, "block": 0, "split": "train", "random": True, "supervised": "absent.pth",
        "batch_size": 3, "threads": 2,
    },
    "dense": {
        "size": 24, "epochs": 2, "batch_size": 16, "lr": 0.1, "weight_decay": 0.5, "scale": (0.9, 1.0), "seed": 1,
        "threads": 2,
    },
}  # fmt: skip
FILES = ("lists", "whitening", "distractors")  # keys whose values are paths below `files`


@pytest.fixture
def observe(mean_model, files):
    """`observe(name, changes)`: figures, and what was asked for on the way, of a protocol with these keys."""

    def run(name, changes):
        config, seen = protocol.get(name).default_config(), []
        config.update(BASE[name] | changes)
        with pytest.MonkeyPatch.context() as patch:
            for module in (features, batches):
                patch.setattr(module, "make_eval_dataset", recorded_dataset(seen, module.make_eval_dataset))
            for module in READING:
                patch.setattr(module, "parallel", recorded_threads(seen, module.parallel))
            for module in (copydetection, retrieval, voc, vos):
                patch.setattr(module, "run", fake_run(seen))
            try:
                figures = globals()[f"run_{name}"](mean_model, files, config, patch, seen)
            except UserError as error:
                figures = {"error": str(error)}
        return figures, seen

    return run


@pytest.fixture(scope="module")
def before():
    return {}


def test_every_key_of_every_protocol_has_an_entry():
    assert set(SWEEP) == set(protocol.names())
    for name, entries in SWEEP.items():
        assert {key for key, _ in flat_keys(protocol.get(name).keys)} == set(entries), name


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, entries in SWEEP.items() for key in entries])
def test_a_key_changed_alone_matters(name, key, observe, before, files):
    if name not in before:
        before[name] = str(observe(name, {}))
        assert str(observe(name, {})) == before[name]  # or else any two observations would differ
        assert "error" not in before[name]
    value = SWEEP[name][key]
    if key in FILES:
        value = tuple(str(files / x) for x in value) if isinstance(value, tuple) else str(files / value)
    assert str(observe(name, {key: value})) != before[name]
