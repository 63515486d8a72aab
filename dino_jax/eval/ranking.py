"""Ranking scores and feature transforms for retrieval and copy detection.

Average precision uses the trapezoid rule of the Oxford buildings benchmark, as do the revisited Oxford and Paris
protocol (Radenovic et al. 2018) and the Holidays and Copydays package (Jegou et al. 2008).

Legend: N database, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dino_jax.errors import UserError
from dino_jax.models.layers import unit


def average_precision(ranks: Int[np.ndarray, " found"], positives: int) -> float:
    """Area under the precision-recall curve by trapezoids.

    Args:
      ranks: zero-based ranks of the positives found, ascending.
      positives: number of positives in total, found or not.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float(np.sum(before + after) / (2 * positives))


def revisited_scores(
    similarity: Float[np.ndarray, "N Q"],
    truth: Sequence[Mapping[str, Any]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict]:
    """Mean average precision of the revisited protocol.

    Args:
      similarity: [N, Q] float.
      truth: `easy`, `hard` and `junk` database rows per query.
      ks: depths of mean precision, limited by each query's last positive as in the official `evaluate.py`.

    Returns:
      `{"medium": {"map": .., "aps": [Q], "mpk": {k: ..}}, "hard": ...}` in 0..1. Positives are easy and hard
      for medium, only hard for hard, which ignores easy as junk. A query without positives is NaN in `aps` and skipped
      in the means.
    """
    order = np.argsort(-similarity, axis=0, kind="stable")  # [N, Q]
    wanted = {"medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy"))}
    scores = {}
    for name, (good, ignored) in wanted.items():
        aps, precisions = np.full(len(truth), np.nan), np.full((len(truth), len(ks)), np.nan)
        for q, entry in enumerate(truth):
            positives = np.concatenate([np.asarray(entry[key], int) for key in good])
            if len(positives):
                junk = np.concatenate([np.asarray(entry[key], int) for key in ignored])
                kept = order[~np.isin(order[:, q], junk), q]
                ranks = np.flatnonzero(np.isin(kept, positives))
                aps[q] = average_precision(ranks, len(positives))
                depth = np.minimum(ks, ranks[-1] + 1)
                precisions[q] = [np.mean(np.isin(kept[:k], positives)) for k in depth]
        if np.isnan(aps).all():
            raise UserError(f"retrieval: no query has a {name} positive: check the gnd file")
        mpk = dict(zip(ks, np.nanmean(precisions, axis=0).tolist(), strict=True))
        scores[name] = {"map": float(np.nanmean(aps)), "aps": aps, "mpk": mpk}
    return scores


def similarity(database: Float[np.ndarray, "N D"], queries: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "N Q"]:
    """Cosine similarity [N, Q], at the highest matmul precision."""
    return np.asarray(jnp.matmul(unit(jnp.asarray(database)), unit(jnp.asarray(queries)).T, precision="highest"))


def gem(patches: Float[Array | np.ndarray, "B N D"], power: float = 4.0, floor: float = 1e-6) -> Float[Array, "B D"]:
    """Generalized mean [B, D] over patch tokens [B, N, D], with values clipped below at `floor`."""
    return jnp.mean(jnp.maximum(patches, floor) ** power, axis=1) ** (1 / power)


class Whitening:
    """PCA whitening as in the official copy detection, fitted on features [N, D].

    The axes are the eigenvectors of the *uncentered* covariance, largest first, divided by eigenvalue**power (0.5
    whitens). Eigenvalues are clipped at 1e-5 of the largest. Data are centered by the mean.
    """

    def __init__(self, features: Float[np.ndarray, "N D"], power: float = 0.5):
        features = np.asarray(features, np.float64)
        values, vectors = np.linalg.eigh(features.T @ features / len(features))
        values = np.maximum(values, values.max() * 1e-5)[::-1]
        self.mean = features.mean(axis=0)  # [D]
        self.projection = vectors[:, ::-1] / values**power  # [D, D]

    def __call__(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        return (np.asarray(features, np.float64) - self.mean) @ self.projection
