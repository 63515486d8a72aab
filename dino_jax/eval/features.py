"""Extracts features: jitted, batched and spread over the devices.

`run` maps a view of the backbone (`Cls`, `Pooled`, ...) over batches of images, `extract` collects the features and
labels of a data set, and `source_features` also caches them for other protocols.

Legend: B batch, N tokens, D width, H heads, n blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dino_jax.data.identity import data_fingerprint
from dino_jax.data.pipeline import make_eval_dataset
from dino_jax.data.sources import Source
from dino_jax.errors import UserError
from dino_jax.eval.results import load_arrays, optional, save_arrays
from dino_jax.inference.model import Forward, Model
from dino_jax.models import Backbone
from dino_jax.progress import Progress

Batch = dict[str, Any]
View = Callable[[Backbone, jax.Array], Any]
MAX_BAD_SHARE = 0.01  # more unreadable images than this share are an error

_log = logging.getLogger(__name__)


def whole_patches(model: Model, size: int) -> int:
    """`size` rounded down to whole patches, in pixels; `UserError` if smaller than one patch."""
    patch = model.backbone.patch_size
    if size < patch:
        raise UserError(f"--config.size={size} is smaller than a patch of {patch} pixels")
    return size // patch * patch


@dataclasses.dataclass(frozen=True)
class Cls:
    """The backbone's output [B, D]: CLS after the final norm, or a ResNet's pooled map."""

    def __call__(self, backbone: Backbone, images: jax.Array) -> jax.Array:
        return backbone(images)


@dataclasses.dataclass(frozen=True)
class Pooled:
    """CLS tokens of the last n blocks [B, n, D] and the last block's mean patch token [B, D]: `cls` and `mean`.

    For a backbone without patches (ResNet), both are its pooled map, with n = 1.
    """

    n: int = 4

    def __call__(self, backbone: Backbone, images: jax.Array) -> dict[str, jax.Array]:
        if backbone.patch_size is None:
            pooled = backbone(images)
            return {"cls": pooled[:, None], "mean": pooled}
        tokens = backbone.tokens(images, self.n)  # [n, B, ...]
        return {"cls": jnp.moveaxis(tokens.cls, 0, 1), "mean": jnp.mean(tokens.flat_patches[-1], axis=1)}


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patch tokens of the last block after the final norm, [B, h, w, D]."""

    def __call__(self, backbone: Backbone, images: jax.Array) -> jax.Array:
        return backbone.tokens(images).patches[0]


@dataclasses.dataclass(frozen=True)
class ClsAttention:
    """Attention from CLS to the patches in one block, [B, H, h, w]."""

    block: int = -1

    def __call__(self, backbone: Backbone, images: jax.Array) -> jax.Array:
        return backbone.cls_attention(images, self.block)


def linear_input(pooled: dict[str, jax.Array], n: int, avgpool: bool) -> jax.Array:
    """The input of the official linear heads, from the output of `Pooled` for at least n blocks.

    Without `avgpool`: the CLS tokens of the last n blocks concatenated, [B, n * D]. With `avgpool` and n = 1: CLS and
    mean patch token *interleaved*, [cls0, avg0, cls1, avg1, ...], as released heads expect, [B, 2 * D]. With `avgpool`
    and n > 1 (not in the official code): the CLS tokens, then the mean patch token, [B, (n + 1) * D].
    """
    cls = pooled["cls"][:, -n:].reshape(len(pooled["cls"]), -1)  # [B, n * D]
    if not avgpool:
        return cls
    if n > 1:
        return jnp.concatenate([cls, pooled["mean"]], axis=1)
    return jnp.stack([cls, pooled["mean"]], axis=-1).reshape(len(cls), -1)  # [B, D, 2] -> [B, 2 * D]


def run(
    model: Model, view: View, batches: Iterable[Batch], *, devices: Sequence[jax.Device] | None = None
) -> Iterator[tuple[Any, Batch]]:
    """Yields (view(backbone, normalized images), batch) for each batch, in order, as NumPy arrays.

    `batch["image"]` is [B, h, w, C], uint8 or float in 0..255. Batches are padded to a multiple of the devices and to
    the largest batch so far; the padding is removed again. One batch computes while the previous one is copied. Each
    process runs its own batches on its own devices.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    forward = _compiled(model.forward, view, mesh)
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


def _local(x: Any) -> Any:
    """Copies an array replicated over all processes to this host, so it can be placed on any device."""
    return np.asarray(x) if isinstance(x, jax.Array) and not x.is_fully_addressable else x


def _fetch(outputs: Any, batch: Batch) -> tuple[Any, Batch]:
    return jax.tree.map(lambda x: np.asarray(x)[: len(batch["image"])], outputs), batch


@functools.lru_cache(maxsize=32)
def _compiled(forward: Forward, view: View, mesh: Mesh) -> Callable[[Any, jax.Array], Any]:
    rows = NamedSharding(mesh, P("data"))
    return jax.jit(lambda variables, images: forward(variables, images, view), out_shardings=rows)


def extract(
    model: Model,
    batches: Iterable[Batch],
    *,
    view: View = Cls(),
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] float32 and labels [N] int64 of all readable images, ordered by `index`, on every process.

    Args:
      batches: this process's share, from `data.pipeline.make_eval_dataset`: `image` uint8 [B, h, w, C], `label` and
        `index` int [B], `valid` bool [B].
      view: what to take from the backbone.
      progress: called after each batch with the number of images done in this process.

    Raises:
      UserError: no image could be read.
    """
    rows: list[tuple[np.ndarray, ...]] = []
    for output, batch in run(model, view, batches, devices=devices):
        valid = batch["valid"]
        rows.append((np.asarray(output, np.float32)[valid], batch["label"][valid], batch["index"][valid]))
        if progress is not None:
            progress(sum(len(index) for _, _, index in rows))
    if not rows:
        raise UserError("the data set has no images: check --data")
    features, labels, index = (np.concatenate(column) for column in zip(*rows, strict=True))
    if jax.process_count() > 1:
        features, labels, index = _gather(features, labels, index)
    if not len(index):
        raise UserError("none of the images can be read: check --data")
    order = np.unique(index, return_index=True)[1]  # images seen by several processes count once
    return features[order], labels[order].astype(np.int64)


def _gather(*arrays: np.ndarray) -> list[np.ndarray]:
    """Concatenates the rows of all processes, which may differ in number."""
    counts = multihost_utils.process_allgather(np.array(len(arrays[0])))
    filled = [np.concatenate([a, np.zeros((counts.max() - len(a), *a.shape[1:]), a.dtype)]) for a in arrays]
    gathered = [multihost_utils.process_allgather(a) for a in filled]  # [processes, most, ...]
    return [np.concatenate([part[:count] for part, count in zip(a, counts, strict=True)]) for a in gathered]


def source_features(
    model: Model, source: Source, spec: str, config: ConfigDict, *, view: View = Cls(), workdir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`extract` for a source, with `resize`, `crop`, `batch_size` and `workers` of `config`.

    With a `workdir`, the features are cached there by weights, view, the data's identity, `resize` and `crop`.
    """
    path = None
    if workdir is not None:
        key = f"{data_fingerprint(source)} {config.resize} {config.crop} {view} {fingerprint(model)}"
        path = epath.Path(workdir) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if path.exists():
            saved = load_arrays(path, {"features": ("f", 2), "labels": ("i", 1)})
            if len(saved["features"]) != len(saved["labels"]):
                raise UserError(f"{path}: as many features as labels are needed: remove the file")
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
        with optional(str(path)):
            save_arrays(path, features=features, labels=labels)
    return features, labels


def counted(batches: Iterable[Batch], spec: str, total: int) -> Iterator[Batch]:
    """Passes batches through and logs unreadable images; too many are an error."""
    bad: list[tuple] = []
    for batch in batches:
        for entry in batch["bad"]:
            _log.warning("%s: %s is skipped: %s", spec, *entry[1:])
            bad.append(entry)
        if len(bad) > MAX_BAD_SHARE * total:
            _, name, reason = bad[0]
            raise UserError(
                f"{spec}: {len(bad)} of {total} images cannot be read, first {name} ({reason}): fix or remove them"
            )
        yield batch


def fingerprint(model: Model) -> str:
    """A short hash of a network and its weights, the same on every machine."""
    digest = hashlib.sha256(f"{model.backbone} {model.mean} {model.std}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(_local(leaf)).tobytes())
    return digest.hexdigest()[:16]
