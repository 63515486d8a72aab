"""Copy detection on INRIA Copydays (paper table 4; official `eval_copy_detection.py`).

Layout: `DATA/original`, `DATA/strong` and optionally `DATA/jpegqual/*` and `DATA/crops/*`. Every copy is a query; the
database is the originals plus any distractors. Features are CLS concatenated with GeM-pooled patch tokens, PCA-whitened
if `whitening` names other images. The score is the mean average precision over the top 20.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.errors import UserError
from dino_jax.eval.features import run
from dino_jax.eval.images import batches_by_size, list_images, parallel, read_image, resize
from dino_jax.eval.protocol import THREADS, Data, Protocol
from dino_jax.eval.ranking import Whitening, average_precision, gem, similarity
from dino_jax.inference.model import Model

DEPTH = 20
PREFIX = 4  # leading characters of a file name that a copy shares with its original

KEYS = {
    "size": Key(320, "side of the square that images are resized to, bicubic", "[1, inf)", most=MOST_PIXELS),
    "whitening": Key(str, "folder of images to fit the whitening on (paper: 20k of YFCC100M)"),
    "distractors": Key(str, "folder of images added to the database (paper: 10k of YFCC100M)"),
    "batch_size": Key(32, "images per batch", "[1, inf)"),
    "threads": THREADS,
}


@dataclasses.dataclass(frozen=True)
class ClsAndGem:
    """CLS and GeM-pooled patch tokens of the last block, concatenated: [B, 2 * D]."""

    def __call__(self, backbone: nn.Module, images: jax.Array) -> jax.Array:
        tokens = backbone.tokens(images)
        return jnp.concatenate([tokens.cls[0], gem(tokens.flat_patches[0])], axis=1)


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`map_<block>` in percent for every block of copies: `map_strong`, `map_jpegqual/3`, ..."""
    blocks = _blocks(data)
    features = {name: squeezed_features(model, paths, config) for name, paths in blocks.items()}
    database = features["original"]
    if config.distractors is not None:
        extra = squeezed_features(model, list_images(config.distractors), config)
        database = np.concatenate([database, extra])
    if config.whitening is not None:
        whiten = Whitening(squeezed_features(model, list_images(config.whitening), config))
        features, database = {name: whiten(rows) for name, rows in features.items()}, whiten(database)
    originals = [path.name[:PREFIX] for path in blocks["original"]]
    return {
        f"map_{name}": 100 * copy_score(database, features[name], originals, [path.name[:PREFIX] for path in paths])
        for name, paths in blocks.items()
    }


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=Data("folder with original and strong", lambda f: (f / "original").is_dir() and (f / "strong").is_dir()),
    needs_patches=True,
    whole_patches=("size",),
    published={"map_strong": {"B/16": 81.7, "B/8": 85.5}},
    source="the paper, table 4: B/16 at 224, B/8 at 320 pixels, whitened and with distractors",
    order=50,
)


def copy_score(database: np.ndarray, queries: np.ndarray, originals: Sequence[str], copies: Sequence[str]) -> float:
    """Mean average precision over the top `DEPTH` of each query [Q, D] in the database [N, D].

    Args:
      originals: keys of the database's first rows; the others are distractors.
      copies: key of each query's original.
    """
    near = np.argsort(-similarity(database, queries), axis=0, kind="stable")[:DEPTH].T  # [Q, DEPTH]
    keys = np.array([*originals, *[""] * (len(database) - len(originals))])
    scores = [
        average_precision(np.flatnonzero(keys[rows] == copy), int(np.sum(keys == copy)))
        for rows, copy in zip(near, copies, strict=True)
    ]
    return float(np.mean(scores))


def _blocks(data: str) -> dict[str, list[epath.Path]]:
    """Images by block name, originals first."""
    root = epath.Path(data)
    if not (root / "original").is_dir():
        raise UserError(f"--data={data}: it has no folder named original: give the Copydays folder")
    folders = [root / "original", root / "strong"]
    folders += [f for part in ("jpegqual", "crops") if (root / part).is_dir() for f in sorted((root / part).iterdir())]
    blocks = {str(f.relative_to(root)): list_images(f) for f in folders if f.is_dir()}
    keys = {path.name[:PREFIX] for path in blocks["original"]}
    for paths in blocks.values():
        orphans = [path for path in paths if path.name[:PREFIX] not in keys]
        if orphans:
            raise UserError(f"{orphans[0]}: no original has a name starting with {orphans[0].name[:PREFIX]}")
    return blocks


def squeezed_features(model: Model, paths: Sequence[epath.Path], config: ConfigDict) -> np.ndarray:
    """`ClsAndGem` [N, 2 * D] of images resized to a square."""

    def load(path: epath.Path) -> np.ndarray:
        return resize(read_image(path, len(model.mean)), config.size, config.size, Image.Resampling.BICUBIC)

    batches = batches_by_size(parallel(load, paths, config.threads), config.batch_size)
    return np.concatenate([out for out, _ in run(model, ClsAndGem(), batches)])
