"""Weighted k-nearest-neighbor classification of frozen features (paper section 4.1; official `eval_knn.py`).

Features are L2-normalized. The k most similar training images vote for their label with weight exp(similarity / T),
and a test image is correct for top-1 (top-5) if its class has the most votes (is among the first five).

Training features stay on the host and stream through the devices in chunks, while each device keeps the best k so far
for its share of the test images. Neither side has to fit on one device, and no full similarity matrix is built.

Legend: Q queries, M training images in a chunk, D width, K largest k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dino_jax.config import Key
from dino_jax.data.decode import decode
from dino_jax.errors import UserError
from dino_jax.eval.draw import GREEN, RED, SHOWN, save_rows, tile
from dino_jax.eval.features import source_features
from dino_jax.eval.protocol import CROP, RESIZE, WORKERS, Protocol
from dino_jax.eval.results import optional
from dino_jax.eval.splits import CLASSES, check_labels, open_splits
from dino_jax.inference.model import Model
from dino_jax.models.layers import unit

ROUND = 128  # chunks of training images are a multiple of this
QUERY_BLOCK = 5120  # queries per device and call
QUERY_ROWS = 512  # of those, compared at once
AT_ONCE = 2  # concurrent calls: a CPU ranks in one while it multiplies in another

_unit = jax.jit(unit)

KEYS = {
    "k": Key((10, 20, 100, 200), "numbers of neighbors; any above the training set's size are skipped", "[1, inf)"),
    "temperature": Key(0.07, "temperature of the neighbors' votes", "(0, inf)"),
    "resize": RESIZE,
    "crop": CROP,
    "batch_size": Key(256, "images per batch", "[1, inf)"),
    "workers": WORKERS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`top1_k<k>` and `top5_k<k>` in percent. `data` is as in `splits.train_test`.

    With a `workdir`, features are cached there, and `knn.png` shows some test images and their neighbors, framed in
    green if of the same class.
    """
    train_spec, train, test_spec, test = open_splits(data)
    if min(config.k) > len(train):
        raise UserError(f"--config.k={config.k}: there are only {len(train)} training images: lower it")
    features, labels = source_features(model, train, train_spec, config, workdir=workdir)
    test_features, test_labels = source_features(model, test, test_spec, config, workdir=workdir)
    num_classes = check_labels(labels, test_labels, data)
    ks = [k for k in config.k if k <= len(features)] or list(config.k)
    scores = knn_classify(
        features, labels, test_features, test_labels, ks=ks, temperature=config.temperature, num_classes=num_classes
    )
    if workdir is not None and jax.process_index() == 0:
        with optional(f"{workdir}/knn.png"):
            _draw(epath.Path(workdir) / "knn.png", (train, features, labels), (test, test_features, test_labels))
    return {f"top{n}_k{k}": value for k, pair in scores.items() for n, value in zip((1, 5), pair, strict=True)}


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=CLASSES,
    whole_patches=("crop",),
    published={
        "top1_k20": {
            "S/16": 74.5,
            "S/8": 78.3,
            "B/16": 76.1,
            "B/8": 77.4,
            "RN50": 67.5,
            "XCiT-S12/16": 76.0,
            "XCiT-S12/8": 77.1,
            "XCiT-M24/16": 76.4,
            "XCiT-M24/8": 77.9,
        }
    },
    source="ImageNet; the official README",
    order=10,
)


def _draw(path: epath.Path, train: tuple, test: tuple) -> None:
    """Draws neighbors; `train` and `test` are (source, features, labels)."""
    if any(len(source) != len(features) for source, features, _ in (train, test)):
        return  # unreadable images were skipped, so rows are not image numbers
    chosen = np.unique(np.linspace(0, len(test[1]) - 1, SHOWN).astype(int))
    near = nearest(test[1][chosen], train[1], min(SHOWN, len(train[1])), devices=jax.local_devices())[1]
    rows = []
    for query, places in zip(chosen, near, strict=True):
        row = [tile(decode(test[0][int(query)].image, 3), 96)]
        for place in places:
            color = GREEN if train[2][place] == test[2][query] else RED
            row.append(tile(decode(train[0][int(place)].image, 3), 96, color))
        rows.append(row)
    save_rows(path, rows)


def knn_classify(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 65536,
    devices: Sequence[jax.Device] | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent for each k.

    Args:
      train_features: [N, D] float, need not be normalized; any array with NumPy slicing, e.g. a memory map.
      train_labels: [N] int in 0..num_classes-1.
      test_features: [Q, D] float.
      test_labels: [Q] int.
      ks: numbers of neighbors; the largest must not exceed N.
      temperature: T of the vote's weight.
      num_classes: default the largest label + 1.
      chunk: training images on the devices at a time.
      devices: default all.

    Raises:
      UserError: k exceeds the training images, missing or negative labels, or unequal lengths.
    """
    _check(train_features, train_labels, test_features, test_labels, ks)
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    similarities, indices = nearest(test_features, train_features, max(ks), chunk=chunk, devices=devices)
    neighbor_labels = train_labels[indices]  # [Q, K]
    return {k: vote(similarities[:, :k], neighbor_labels[:, :k], test_labels, temperature, num_classes) for k in ks}


def vote(
    similarities: np.ndarray, neighbor_labels: np.ndarray, labels: np.ndarray, temperature: float, num_classes: int
) -> tuple[float, float]:
    """Top-1 and top-5 in percent, from similarities and labels of each query's neighbors [Q, k] and true labels [Q].

    Ties are ranked by class number. As in the official code, top-5 considers at most k classes.
    """
    weights = np.exp((similarities.astype(np.float64) - 1) / temperature)  # [Q, k]; the shift keeps the ranking
    classes, ranks = np.arange(num_classes), []
    step = max(1, 2**24 // num_classes)  # queries per batch: at most 128 MB of votes
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        truth = labels[rows, None]  # [q, 1]
        cells = np.arange(len(truth))[:, None] * num_classes + neighbor_labels[rows]
        flat = np.bincount(cells.ravel(), weights[rows].ravel(), len(truth) * num_classes)
        votes = flat.reshape(-1, num_classes)  # [q, classes]
        own = np.take_along_axis(votes, truth, axis=1)
        ranks.append(np.sum((votes > own) | ((votes == own) & (classes < truth)), axis=1))
    rank = np.concatenate(ranks)  # [Q] 0: most votes
    return 100 * float(np.mean(rank < 1)), 100 * float(np.mean(rank < min(5, similarities.shape[1])))


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    *,
    chunk: int = 65536,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank` [N, D] with the largest cosine similarity to each of `queries` [Q, D], best first.

    Returns similarities [Q, k] float and row numbers [Q, k] int32. Products use the highest precision. In a multi-host
    run, every process passes the same arrays and gets the full result.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh = Mesh(np.array(devices), ("data",))
    dtype = jax.dtypes.canonicalize_dtype(np.promote_types(queries.dtype, np.float32))
    put = functools.partial(_put, mesh=mesh, dtype=dtype)
    share = _equal(_equal(-(-len(queries) // len(devices)), QUERY_BLOCK)[1], QUERY_ROWS)
    rows = math.prod(share) * len(devices)  # in a block, over all devices
    blocks = [_unit(put(queries[i : i + rows], rows, P("data"))) for i in range(0, len(queries), rows)]
    best: list[tuple[jax.Array, ...]] = [()] * len(blocks)
    chunk = -(-max(min(chunk, len(bank)), k) // ROUND) * ROUND
    search = _search(mesh, k)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(bank), chunk):
            part = _unit(put(bank[start : start + chunk], chunk, P()))
            place = np.int32(start), np.int32(min(chunk, len(bank) - start))
            work = lambda block, found: jax.block_until_ready(search(part, *place, block, *found))  # noqa: B023, E731
            best = list(pool.map(work, blocks, best))
    best = [_gather(mesh)(*found) for found in best]
    similarities, indices = (np.concatenate(column)[: len(queries)] for column in zip(*best, strict=True))
    return similarities, indices


def _equal(number: int, most: int) -> tuple[int, int]:
    """Splits `number` into the fewest equal parts of at most `most`: (parts, size of each, rounded up)."""
    parts = -(-number // most)
    return parts, -(-number // parts)


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Replicates a block's results so that every process can read them."""
    return jax.jit(lambda *x: x, out_shardings=NamedSharding(mesh, P()))


def _put(array: np.ndarray, rows: int, spec: P, *, mesh: Mesh, dtype: np.dtype) -> jax.Array:
    """Pads an array with zeros to `rows` rows and shards it over the mesh (each process provides its shards)."""
    padded = np.zeros((rows, *array.shape[1:]), dtype)
    padded[: len(array)] = array
    return jax.make_array_from_callback(padded.shape, NamedSharding(mesh, spec), lambda where: padded[where])


@functools.lru_cache(maxsize=8)
def _search(mesh: Mesh, k: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted step: updates a block of queries' best k with the bank's rows `part` [M, D]."""

    def local(part: jax.Array, start: jax.Array, valid: jax.Array, *block: jax.Array) -> tuple[jax.Array, jax.Array]:
        def rows(block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            queries, *before = block
            similarity = jnp.matmul(queries, part.T, precision="highest")  # [Q, M]
            value, column = candidates(similarity, k, valid)
            column += start
            if before:
                value = jnp.concatenate([before[0], value], 1)
                column = jnp.concatenate([before[1], column], 1)
            value, order = jax.lax.top_k(value, k)  # [Q, K]
            return value, jnp.take_along_axis(column, order, 1)

        split = lambda x: x.reshape(*_equal(len(x), QUERY_ROWS), x.shape[1])  # noqa: E731
        found = jax.lax.map(rows, jax.tree.map(split, block))
        return jax.tree.map(lambda x: x.reshape(-1, k), found)

    def search(part: jax.Array, start: jax.Array, valid: jax.Array, *block: jax.Array) -> tuple[jax.Array, jax.Array]:
        specs = (P(), P(), P(), *[P("data")] * len(block))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))(part, start, valid, *block)

    return jax.jit(search)


def candidates(values: jax.Array, k: int, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Candidates for the k largest among the first `valid` entries of each row of [B, M], and their columns (int32).

    The k largest lie in the k column blocks with the largest maxima. Blocks have about sqrt(M / k) columns, which
    balances ranking the maxima and ranking the candidates. Invalid entries are -inf; only the block where the valid
    columns end is masked, as masking all of `values` would cost as much as the ranking.
    """
    width = values.shape[1]
    block = min(2 ** round(math.log2(width / k) / 2), ROUND)
    mask = lambda x, columns: jnp.where(columns < valid, x, -jnp.inf)  # noqa: E731
    inside = jnp.arange(block, dtype=jnp.int32)
    if block == 1 or width % block:
        columns = jnp.arange(width, dtype=jnp.int32)
        return mask(values, columns), jnp.broadcast_to(columns, values.shape)
    blocks, last = values.reshape(len(values), -1, block), valid // block
    maxima = blocks.max(-1)  # [B, M / block]
    end = mask(jax.lax.dynamic_index_in_dim(blocks, last, 1, keepdims=False), last * block + inside).max(-1)
    number = jnp.arange(width // block)
    maxima = jnp.where(number < last, maxima, jnp.where(number == last, end[:, None], -jnp.inf))
    _, chosen = jax.lax.top_k(maxima, k)  # [B, k]
    held = jax.vmap(lambda row, places: row.at[places].get(mode="promise_in_bounds"))(blocks, chosen)  # [B, k, block]
    columns = (chosen[:, :, None] * block + inside).astype(jnp.int32)
    return mask(held, columns).reshape(len(values), -1), columns.reshape(len(values), -1)


def _check(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    ks: Sequence[int],
) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) != len(labels) or not len(features):
            raise UserError(f"knn: {len(features)} {name} features but {len(labels)} labels: give as many of each")
        if np.min(labels) < 0:
            raise UserError(f"knn: the {name} images have no labels: use class folders or a labeled source")
    if max(ks) > len(train_features):
        raise UserError(f"knn: k={max(ks)} exceeds the {len(train_features)} training images: lower k")
