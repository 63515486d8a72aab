"""The KoLeo term: spreads the features of a batch over the sphere (Sablayrolles et al. 2019, arXiv 1806.03198).

As in DINOv2 (arXiv 2304.07193, section 4): on the student's CLS features before the head, separately for each global
view, over the images of one microbatch on one device. So its value depends on the number of devices and microbatches.
DINOv2's weight is 0.1.

Legend: B batch, C crops (2 global ones first), D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dino_jax.models.network import Outputs
from dino_jax.objectives.objective import Objective

EPS = 1e-8
HIGHEST = jax.lax.Precision.HIGHEST


def koleo(features: Float[Array, "B D"]) -> Float[Array, ""]:
    """-mean over images of log(distance to the nearest other image + 1e-8), after L2 normalization.

    Computes in at least float32: 1e-8 is 0 in float16. No gradient flows through the choice of neighbor; the distance
    passes one to both rows, up to 1e8 for duplicates. A single row gives the constant -log(1e-8 (1 + sqrt(D))).
    Official: `KoLeoLoss.forward` of DINOv2.
    """
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    x = x / jnp.maximum(_norm(x)[:, None], EPS)
    distance = _norm(x - x[nearest(x)] + EPS)
    return -jnp.log(distance + EPS).mean()


def nearest(x: Float[Array, "B D"]) -> Int[Array, " B"]:
    """Index of each row's nearest other row by dot product; ties go to the first."""
    products = jnp.matmul(x, x.T, precision=HIGHEST)
    return jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, products), axis=1)


def _norm(x: Float[Array, "B D"]) -> Float[Array, " B"]:
    """L2 norm of each row, with gradient 0 at 0 as in torch."""
    square = jnp.sum(x * x, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def make(config: ConfigDict, schedules: Any) -> Objective:
    """Builds the KoLeo term: `koleo` summed over the two global views; no state, no targets."""

    def loss(student: Outputs, targets: None, step: Array) -> tuple[Array, dict[str, Array]]:
        return koleo(student.cls[:, 0]) + koleo(student.cls[:, 1]), {}

    def flops(student: Outputs) -> float:
        rows, _, width = student.cls.shape
        return 2 * 2.0 * rows * rows * width  # both views; the choice of neighbor has no backward pass

    return Objective(loss=loss, flops=flops, min_rows=2)
