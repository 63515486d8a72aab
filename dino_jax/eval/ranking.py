"""Scores of ranked lists, and the feature transforms that go with them: retrieval and copy detection share them.

Average precision is the trapezoid rule of the Oxford buildings benchmark, used by both the revisited Oxford and Paris
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
      ranks: zero-based ranks at which positives were found, ascending.
      positives: how many there are in all, found or not.
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
      truth: per query the database rows `easy`, `hard` and `junk`.
      ks: depths of mean precision; as in the official `evaluate.py`, a query's last positive bounds its depth.

    Returns:
      `{"medium": {"map": .., "aps": [Q], "mpk": {k: ..}}, "hard": ...}` as shares of 1. Medium counts easy and hard as
      positives; hard counts the hard alone and takes the easy out with the junk. A query without positives is NaN in
      `aps` and left out of the means.
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
    """Cosine similarity [N, Q] at the highest matmul precision."""
    return np.asarray(jnp.matmul(unit(jnp.asarray(database)), unit(jnp.asarray(queries)).T, precision="highest"))


def gem(patches: Float[Array | np.ndarray, "B N D"], power: float = 4.0, floor: float = 1e-6) -> Float[Array, "B D"]:
    """Generalized mean over the patch tokens [B, N, D], values below `floor` raised to it: [B, D]."""
    return jnp.mean(jnp.maximum(patches, floor) ** power, axis=1) ** (1 / power)


class Whitening:
    """PCA whitening as the official copy detection does it, fitted on features [N, D].

    The axes are the eigenvectors of the *uncentered* covariance, largest first, each divided by its eigenvalue to
    `power` (0.5 whitens). Eigenvalues below 1e-5 of the largest are raised to that. Data are centered by the mean.
    """

    def __init__(self, features: Float[np.ndarray, "N D"], power: float = 0.5):
        features = np.asarray(features, np.float64)
        values, vectors = np.linalg.eigh(features.T @ features / len(features))
        values = np.maximum(values, values.max() * 1e-5)[::-1]
        self.mean = features.mean(axis=0)  # [D]
        self.projection = vectors[:, ::-1] / values**power  # [D, D]

    def __call__(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        return (np.asarray(features, np.float64) - self.mean) @ self.projection
