"""The KoLeo term: spreads the features of a batch over the sphere (Sablayrolles et al. 2019, arXiv 1806.03198).

As DINOv2 uses it (arXiv 2304.07193, section 4): on the student's CLS features before the head, each global view by
itself, among the images that a device has at once. So its value depends on the number of devices and microbatches.
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

    Computes in at least float32: 1e-8 is 0 in float16. The choice of the neighbor has no gradient; the distance has one
    into both rows, up to 1e8 for duplicates. One row alone has the constant -log(1e-8 (1 + sqrt(D))).
    Official: `KoLeoLoss.forward` of DINOv2.
    """
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    x = x / jnp.maximum(_norm(x)[:, None], EPS)
    distance = _norm(x - x[nearest(x)] + EPS)
    return -jnp.log(distance + EPS).mean()


def nearest(x: Float[Array, "B D"]) -> Int[Array, " B"]:
    """The row with the largest product with each row, itself excepted; the first of equals."""
    products = jnp.matmul(x, x.T, precision=HIGHEST)
    return jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, products), axis=1)


def _norm(x: Float[Array, "B D"]) -> Float[Array, " B"]:
    """Length of each row, with gradient 0 where it is 0, as torch has it."""
    square = jnp.sum(x * x, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def make(config: ConfigDict, schedules: Any) -> Objective:
    """The sum of `koleo` over the two global views; without state and targets."""

    def loss(student: Outputs, targets: None, step: Array) -> tuple[Array, dict[str, Array]]:
        return koleo(student.cls[:, 0]) + koleo(student.cls[:, 1]), {}

    def flops(student: Outputs) -> float:
        rows, _, width = student.cls.shape
        return 2 * 2.0 * rows * rows * width  # products of two views; the choice has no backward pass

    return Objective(loss=loss, flops=flops, min_rows=2)
