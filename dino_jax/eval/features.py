"""Frozen features: a network that is only looked at, run over pictures, jitted, batched and spread over the devices.

Every protocol builds on what is here: `Frozen`, a backbone with its weights; `run`, which maps a view of the backbone
(`Cls`, `Pooled`, ...) over batches of pictures; `extract`, which collects the features and labels of a data set; and
`dataset_features`, which also opens the data set and keeps the features for the next protocol.

Legend: B batch, N tokens, D width, H heads, n blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dino_jax.data.pipeline import make_eval_dataset
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.eval.results import load_arrays, save_arrays
from dino_jax.progress import Progress

Batch = dict[str, Any]
View = Callable[[nn.Module, jax.Array], Any]
MAX_BAD_SHARE = 0.01  # unreadable pictures beyond this share of a data set are an error

_log = logging.getLogger(__name__)


class Frozen(NamedTuple):
    """A backbone and its weights; `variables` is `{"params": ..., "batch_stats": ...}`, mean and std are of 0..1."""

    backbone: nn.Module
    variables: Any
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Net(NamedTuple):
    """What of a `Frozen` decides the compiled programs; hashable."""

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def whole_patches(model: Frozen, size: int) -> int:
    """`size` pixels cut down to whole patches; `UserError` where it holds none."""
    patch = model.backbone.patch_size
    if size < patch:
        raise UserError(f"--config.size={size} is smaller than a patch of {patch} pixels")
    return size // patch * patch


def net_of(model: Frozen) -> Net:
    """The model without its weights."""
    return Net(model.backbone, tuple(model.mean), tuple(model.std))


@dataclasses.dataclass(frozen=True)
class Cls:
    """The output of the backbone, [B, D]: CLS after the final norm, or the pooled map of a ResNet."""

    def __call__(self, backbone: nn.Module, images: jax.Array) -> jax.Array:
        return backbone(images)


@dataclasses.dataclass(frozen=True)
class Pooled:
    """CLS tokens of the last n blocks [B, n, D] and the last block's mean patch token [B, D]: `cls` and `mean`.

    A backbone without patches (ResNet) gives its pooled map as both, with n = 1.
    """

    n: int = 4

    def __call__(self, backbone: nn.Module, images: jax.Array) -> dict[str, jax.Array]:
        if backbone.patch_size is None:
            pooled = backbone(images)
            return {"cls": pooled[:, None], "mean": pooled}
        tokens = backbone.tokens(images, self.n)  # [n, B, N, D]
        return {"cls": jnp.moveaxis(tokens[:, :, 0], 0, 1), "mean": jnp.mean(tokens[-1, :, 1:], axis=1)}


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patch tokens of the last block after the final norm, [B, h, w, D]."""

    def __call__(self, backbone: nn.Module, images: jax.Array) -> jax.Array:
        tokens = backbone.tokens(images, 1)[0]  # [B, N, D]
        size = backbone.patch_size
        return tokens[:, 1:].reshape(len(images), images.shape[1] // size, images.shape[2] // size, -1)


@dataclasses.dataclass(frozen=True)
class ClsAttention:
    """What CLS attends to in one block, [B, H, h, w]."""

    block: int = -1

    def __call__(self, backbone: nn.Module, images: jax.Array) -> jax.Array:
        attention = backbone.attention(images, self.block)  # [B, H, N, N]
        size = backbone.patch_size
        grid = images.shape[1] // size, images.shape[2] // size
        return attention[:, :, 0, -grid[0] * grid[1] :].reshape(*attention.shape[:2], *grid)


def linear_input(pooled: dict[str, jax.Array], n: int, avgpool: bool) -> jax.Array:
    """The input of the official linear heads, from what `Pooled` gives for n blocks or more.

    Without `avgpool`: the CLS tokens of the last n blocks side by side, [B, n * D]. With it and n = 1: CLS and mean
    patch token *interleaved*, [cls0, avg0, cls1, avg1, ...], as released heads expect, [B, 2 * D]. With it and n > 1,
    which the official code does not offer: the mean patch token after the CLS tokens, [B, (n + 1) * D].
    """
    cls = pooled["cls"][:, -n:].reshape(len(pooled["cls"]), -1)  # [B, n * D]
    if not avgpool:
        return cls
    if n > 1:
        return jnp.concatenate([cls, pooled["mean"]], axis=1)
    return jnp.stack([cls, pooled["mean"]], axis=-1).reshape(len(cls), -1)  # [B, D, 2] -> [B, 2 * D]


def run(
    model: Frozen, view: View, batches: Iterable[Batch], *, devices: Sequence[jax.Device] | None = None
) -> Iterator[tuple[Any, Batch]]:
    """Yields (view(backbone, normalised images), batch) for each batch, in order, as NumPy arrays.

    `batch["image"]` is [B, h, w, C], uint8 or float of the same range. Batches are filled up to the devices and to the
    largest one before (the filling never comes back), and the next one is under way while the last is being copied.
    Each process runs its own batches on its own devices.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    forward = _forward(net_of(model), view, mesh)
    variables = jax.device_put(jax.tree.map(_local, model.variables), NamedSharding(mesh, P()))
    waiting: tuple[Any, Batch] | None = None
    largest: dict[tuple[int, ...], int] = {}
    for batch in batches:
        images = np.asarray(batch["image"])
        rows = max(-(-len(images) // mesh.size) * mesh.size, largest.get(images.shape[1:], 0))
        largest[images.shape[1:]] = rows
        filled = np.zeros((rows, *images.shape[1:]), images.dtype)
        filled[: len(images)] = images
        outputs = forward(variables, jax.device_put(filled, NamedSharding(mesh, P("data"))))
        if waiting is not None:
            yield _fetch(*waiting)
        waiting = outputs, batch
    if waiting is not None:
        yield _fetch(*waiting)


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Pixels of 0..255 [..., C] to float32 of mean 0 and deviation 1 over ImageNet."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def _local(x: Any) -> Any:
    """An array that this process can place anywhere: a replicated one of all processes is read back."""
    return np.asarray(x) if isinstance(x, jax.Array) and not x.is_fully_addressable else x


def _fetch(outputs: Any, batch: Batch) -> tuple[Any, Batch]:
    return jax.tree.map(lambda x: np.asarray(x)[: len(batch["image"])], outputs), batch


@functools.lru_cache(maxsize=32)
def _forward(net: Net, view: View, mesh: Mesh) -> Callable[[Any, jax.Array], Any]:
    def forward(variables: Any, images: jax.Array) -> Any:
        return net.backbone.apply(variables, normalise(images, net.mean, net.std), method=view)

    return jax.jit(forward, out_shardings=NamedSharding(mesh, P("data")))


def extract(
    model: Frozen,
    batches: Iterable[Batch],
    *,
    view: View = Cls(),
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] float32 and labels [N] int64 of all readable pictures, ordered by `index`.

    Args:
      batches: this process's share, as `data.pipeline.make_eval_dataset` gives it: `image` uint8 [B, h, w, C], `label`
        and `index` int [B], `valid` bool [B]. Every process gets the features of all shares.
      view: what to take from the backbone.
      progress: called after each batch with the number of pictures that this process has done.

    Raises:
      UserError: no picture could be read.
    """
    rows: list[tuple[np.ndarray, ...]] = []
    for output, batch in run(model, view, batches, devices=devices):
        valid = batch["valid"]
        rows.append((np.asarray(output, np.float32)[valid], batch["label"][valid], batch["index"][valid]))
        if progress is not None:
            progress(sum(len(index) for _, _, index in rows))
    if not rows:
        raise UserError("the data set holds no pictures: check --data")
    features, labels, index = (np.concatenate(column) for column in zip(*rows, strict=True))
    if jax.process_count() > 1:
        features, labels, index = _gather(features, labels, index)
    if not len(index):
        raise UserError("none of the pictures can be read: check --data")
    order = np.unique(index, return_index=True)[1]  # a picture that several processes ran counts once
    return features[order], labels[order].astype(np.int64)


def _gather(*arrays: np.ndarray) -> list[np.ndarray]:
    """The rows of every process, one process after another; their numbers may differ."""
    counts = multihost_utils.process_allgather(np.array(len(arrays[0])))
    filled = [np.concatenate([a, np.zeros((counts.max() - len(a), *a.shape[1:]), a.dtype)]) for a in arrays]
    gathered = [multihost_utils.process_allgather(a) for a in filled]  # [processes, most, ...]
    return [np.concatenate([part[:count] for part, count in zip(a, counts, strict=True)]) for a in gathered]


def dataset_features(
    model: Frozen, spec: str, config: ConfigDict, *, view: View = Cls(), workdir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`source_features` of the source that `spec` names."""
    return source_features(model, open_source(spec), spec, config, view=view, workdir=workdir)


def source_features(
    model: Frozen, source: Source, spec: str, config: ConfigDict, *, view: View = Cls(), workdir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`extract` for a source, with the eval view of `config` (`resize crop batch_size workers`).

    With a `workdir` the features are kept in it, by weights, view and `spec`, and found again there.
    """
    path = None
    if workdir is not None:
        key = f"{spec} {len(source)} {config.resize} {config.crop} {view} {fingerprint(model)}"
        path = epath.Path(workdir) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if path.exists():
            saved = load_arrays(path)
            return saved["features"], saved["labels"]
    share = -(-config.batch_size // jax.process_count())
    start = share * jax.process_index()
    batches = make_eval_dataset(
        source,
        resize=config.resize,
        crop=config.crop,
        batch_size=share * jax.process_count(),
        rows=slice(start, start + share),
        channels=len(model.mean),
        workers=config.workers,
    )
    with Progress(len(source), 0, spec, unit="images", active=jax.process_index() == 0) as bar:
        features, labels = extract(
            model,
            counted(batches, spec, len(source)),
            view=view,
            progress=lambda done: bar.update(min(done * jax.process_count(), len(source))),
        )
    if path is not None and jax.process_index() == 0:
        save_arrays(path, features=features, labels=labels)
    return features, labels


def counted(batches: Iterable[Batch], spec: str, total: int) -> Iterator[Batch]:
    """The batches; unreadable pictures are logged by name and left out, too many are an error."""
    bad: list[tuple] = []
    for batch in batches:
        for entry in batch["bad"]:
            _log.warning("%s: %s is left out: %s", spec, *entry[1:])
            bad.append(entry)
        if len(bad) > MAX_BAD_SHARE * total:
            _, name, reason = bad[0]
            raise UserError(
                f"{spec}: {len(bad)} of {total} pictures cannot be read, first {name} ({reason}): mend or remove them"
            )
        yield batch


def fingerprint(model: Frozen) -> str:
    """A short name of a network and its weights, the same on every machine."""
    digest = hashlib.sha256(f"{model.backbone} {model.mean} {model.std}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(_local(leaf)).tobytes())
    return digest.hexdigest()[:16]
