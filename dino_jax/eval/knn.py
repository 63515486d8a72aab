"""Weighted k-nearest-neighbour classification of frozen features (paper section 4.1; official `eval_knn.py`).

Features are L2-normalised, the k most similar training images vote for their label with weight exp(similarity / T),
and a test image counts for top-1 (top-5) when its class is the first (among the first five) by votes.

The training features stay on the host and pass through the devices chunk by chunk, while every device keeps the best
k so far of its own share of the test images. So neither side has to fit one device, and no similarity matrix is kept.

Legend: Q queries, M training images in a chunk, D width, K largest k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.eval.features import Frozen, dataset_features
from dino_jax.eval.splits import check_labels, train_test

BLOCK = 32  # columns whose maximum stands for all of them when the best k are selected
QUERY_BLOCK = 256  # queries compared at once on one device


def default_config() -> ConfigDict:
    """The protocol's keys."""
    config = ConfigDict()
    config.k = (10, 20, 100, 200)  # numbers of neighbours; those beyond the training set's size are left out
    config.temperature = 0.07
    config.resize = 256  # shorter side before the centre crop, bicubic; 0: no resize
    config.crop = 224
    config.batch_size = 256
    config.workers = 0  # reading processes; 0: threads of this one
    return config.lock()


def evaluate(model: Frozen, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`top1_k<k>` and `top5_k<k>` in percent. `data` is as in `splits.train_test`; features are kept in `workdir`."""
    train, test = train_test(data)
    features, labels = dataset_features(model, train, config, workdir=workdir)
    test_features, test_labels = dataset_features(model, test, config, workdir=workdir)
    num_classes = check_labels(labels, test_labels, data)
    ks = [k for k in config.k if k <= len(features)] or list(config.k)
    scores = knn_classify(
        features, labels, test_features, test_labels, ks=ks, temperature=config.temperature, num_classes=num_classes
    )
    return {f"top{n}_k{k}": value for k, pair in scores.items() for n, value in zip((1, 5), pair, strict=True)}


def knn_classify(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 16384,
    devices: Sequence[jax.Device] | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent for each k.

    Args:
      train_features: [N, D] float, need not be normalised; any array with NumPy slicing, a memory map included.
      train_labels: [N] int in 0..num_classes-1.
      test_features: [Q, D] float.
      test_labels: [Q] int.
      ks: numbers of neighbours; the largest must not exceed N.
      temperature: T of the vote's weight.
      num_classes: by default one more than the largest label.
      chunk: training images on the devices at a time.
      devices: default all.

    Raises:
      UserError: more neighbours asked than there are training images, missing or negative labels, unequal lengths.
    """
    _check(train_features, train_labels, test_features, test_labels, ks)
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    similarities, indices = nearest(test_features, train_features, max(ks), chunk=chunk, devices=devices)
    neighbour_labels = train_labels[indices]  # [Q, K]
    return {k: vote(similarities[:, :k], neighbour_labels[:, :k], test_labels, temperature, num_classes) for k in ks}


def vote(
    similarities: np.ndarray, neighbour_labels: np.ndarray, labels: np.ndarray, temperature: float, num_classes: int
) -> tuple[float, float]:
    """Top-1 and top-5 in percent from each query's neighbours: similarities and their labels [Q, k], truth [Q].

    Equal votes are ranked by class number; as in the official code, top-5 looks at no more than k classes.
    """
    weights = np.exp((similarities.astype(np.float64) - 1) / temperature)  # [Q, k]; the shift changes no ranking
    classes, ranks = np.arange(num_classes), []
    step = max(1, 2**24 // num_classes)  # queries at a time: at most 128 MB of votes
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        truth = labels[rows, None]  # [q, 1]
        cells = np.arange(len(truth))[:, None] * num_classes + neighbour_labels[rows]
        votes = np.bincount(cells.ravel(), weights[rows].ravel(), len(truth) * num_classes)
        votes = votes.reshape(-1, num_classes)  # [q, classes]
        own = np.take_along_axis(votes, truth, axis=1)
        ranks.append(np.sum((votes > own) | ((votes == own) & (classes < truth)), axis=1))
    rank = np.concatenate(ranks)  # [Q] 0: most votes
    return 100 * float(np.mean(rank < 1)), 100 * float(np.mean(rank < min(5, similarities.shape[1])))


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    *,
    chunk: int = 16384,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank` [N, D] with the largest cosine similarity to each of `queries` [Q, D], best first.

    Returns similarities [Q, k] float and row numbers [Q, k] int32. Products are taken at the highest precision the
    backend has. Every process of a multi-host run passes the same arrays and gets the whole answer.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh = Mesh(np.array(devices), ("data",))
    count = len(queries)
    block = min(QUERY_BLOCK, -(-count // len(devices)))
    rows = -(-count // (block * len(devices))) * block * len(devices)
    dtype = jax.dtypes.canonicalize_dtype(np.promote_types(queries.dtype, np.float32))
    chunk = -(-min(chunk, max(len(bank), k)) // BLOCK) * BLOCK
    put = functools.partial(_put, mesh=mesh, dtype=dtype)

    held = put(queries, rows, P("data"))
    best = put(np.full((rows, k), -np.inf), rows, P("data"))
    index = put(np.zeros((rows, k), np.int32), rows, P("data"), dtype=np.dtype(np.int32))
    step = _search(mesh, block)
    for start in range(0, len(bank), chunk):
        part = put(bank[start : start + chunk], chunk, P())
        valid = min(chunk, len(bank) - start)
        jax.block_until_ready(best)  # no more than two chunks wait on the devices
        best, index = step(held, part, np.int32(start), np.int32(valid), best, index)
    gather = jax.jit(lambda *x: x, out_shardings=NamedSharding(mesh, P()))
    best, index = gather(best, index)
    return np.asarray(best)[:count], np.asarray(index)[:count]


def _put(array: np.ndarray, rows: int, spec: P, *, mesh: Mesh, dtype: np.dtype) -> jax.Array:
    """The array padded with zero rows to `rows` and laid out over the mesh (each process gives its own shards)."""
    padded = np.zeros((rows, *array.shape[1:]), dtype)
    padded[: len(array)] = array
    return jax.make_array_from_callback(padded.shape, NamedSharding(mesh, spec), lambda where: padded[where])


@functools.lru_cache(maxsize=8)
def _search(mesh: Mesh, block: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted pass of one chunk: running best k of every query against `part` [M, D]."""

    def local(queries, part, start, valid, best, index):
        part = _normalise(part)

        def one(args):
            query, best, index = args  # [block, D], [block, K], [block, K]
            sim = jnp.matmul(_normalise(query), part.T, precision="highest")  # [block, M]
            sim = jnp.where(jnp.arange(sim.shape[1]) < valid, sim, -jnp.inf)
            value, column = top_k(sim, min(best.shape[1], sim.shape[1]))
            value = jnp.concatenate([best, value], 1)
            column = jnp.concatenate([index, column.astype(jnp.int32) + start], 1)
            value, order = jax.lax.top_k(value, best.shape[1])
            return value, jnp.take_along_axis(column, order, 1)

        fold = lambda x: x.reshape(-1, block, x.shape[-1])  # noqa: E731  [q, .] -> [q / block, block, .]
        best, index = jax.lax.map(one, (fold(queries), fold(best), fold(index)))
        return best.reshape(-1, best.shape[-1]), index.reshape(-1, index.shape[-1])

    specs = (P("data"), P(), P(), P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data"))))


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of [B, M] and their columns; exact, and cheaper than a plain selection for large M.

    The k largest entries lie in the k blocks with the largest maxima, so only those blocks' entries are ranked.
    """
    count = values.shape[1] // BLOCK
    if values.shape[1] % BLOCK or count <= 2 * k:
        return jax.lax.top_k(values, k)
    blocks = values.reshape(-1, count, BLOCK)  # [B, M / BLOCK, BLOCK]
    _, chosen = jax.lax.top_k(blocks.max(-1), k)  # [B, k]
    held = jnp.take_along_axis(blocks, chosen[:, :, None], 1)  # [B, k, BLOCK]
    value, place = jax.lax.top_k(held.reshape(-1, k * BLOCK), k)
    block = jnp.take_along_axis(chosen, place // BLOCK, 1)
    return value, block * BLOCK + place % BLOCK


def _normalise(x: jax.Array) -> jax.Array:
    """Rows divided by their L2 norm, which is floored at 1e-12 as torch's `normalize` does."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    ks: Sequence[int],
) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) != len(labels) or not len(features):
            raise UserError(f"knn: {len(features)} {name} features for {len(labels)} labels: give one label a feature")
        if np.min(labels) < 0:
            raise UserError(f"knn: the {name} images have no labels: use class folders or a labelled source")
    if max(ks) > len(train_features):
        raise UserError(f"knn: k={max(ks)} exceeds the {len(train_features)} training images: lower k")
