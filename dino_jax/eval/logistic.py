"""L2-regularized multinomial logistic regression by Newton-CG, with a certified distance from the optimum.

The objective is mean cross-entropy + penalty / 2 * |W|^2, without an intercept. It is strongly convex, so its value is
at most |gradient|^2 / (2 * penalty) above the optimum; this bound is the stopping rule.

Legend: n rows, D width, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

CG_STEPS = 100  # at most, per Newton direction
SHORTEST = 2.0**-20  # step, as a share of the Newton direction


class Fit(NamedTuple):
    """Weights [D, K] float32, the objective's value, its bound above the optimum, and the number of Newton steps."""

    weights: np.ndarray
    loss: float
    gap: float
    iterations: int


def fit_logistic(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    penalty: float,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    devices: Sequence[jax.Device] | None = None,
) -> Fit:
    """Minimizes the objective for features [n, D] and labels int [n].

    Args:
      tolerance: stop once the value is certified to be within this of the optimum.
      max_iterations: most Newton steps; `Fit.gap` is the bound reached.
      devices: shard the rows over these; default all of this process.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    rows = -(-len(features) // mesh.size) * mesh.size
    filled = np.zeros((rows, features.shape[1]), np.float32)
    filled[: len(features)] = features
    targets = np.full(rows, -1, np.int32)  # -1: padding
    targets[: len(labels)] = labels
    filled, targets = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (filled, targets))
    start = jnp.zeros((features.shape[1], num_classes))
    weights, loss, gap, count = _solve(start, filled, targets, penalty, tolerance, max_iterations)
    return Fit(np.asarray(weights), float(loss), float(gap), int(count))


def objective(
    logits: Float[Array, "n K"],
    weights: Float[Array, "D K"],
    labels: Int[Array, " n"],
    penalty: float | Float[Array, ""],
) -> Float[Array, ""]:
    """Mean cross-entropy over rows with label >= 0, plus penalty / 2 * |weights|^2."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    counted = labels >= 0
    return jnp.sum(losses * counted) / jnp.sum(counted) + penalty / 2 * jnp.sum(weights**2)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _solve(
    weights: Float[Array, "D K"],
    features: Float[Array, "n D"],
    labels: Int[Array, " n"],
    penalty: float | Float[Array, ""],
    tolerance: float | Float[Array, ""],
    max_iterations: int,
) -> tuple[Float[Array, "D K"], Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """Newton steps: direction by conjugate gradients, length by backtracking on the cached logits."""
    dot = functools.partial(jnp.matmul, precision="highest")
    share = (labels >= 0)[:, None] / jnp.sum(labels >= 0)  # [n, 1]
    targets = jax.nn.one_hot(labels, weights.shape[1])  # [n, K]; zero for padding

    def gradient(weights, logits):
        return dot(features.T, share * (jax.nn.softmax(logits) - targets)) + penalty * weights

    def step(carry):
        weights, logits, grad, _, count = carry
        probability = jax.nn.softmax(logits)

        def curvature(v):  # Hessian times v [D, K]
            rows = probability * dot(features, v)
            return dot(features.T, share * (rows - probability * rows.sum(1, keepdims=True))) + penalty * v

        size = jnp.linalg.norm(grad)
        accuracy = jnp.minimum(0.1, jnp.sqrt(size))
        direction, _ = jax.scipy.sparse.linalg.cg(curvature, -grad, tol=accuracy, maxiter=CG_STEPS)
        along, slope = dot(features, direction), jnp.sum(grad * direction)
        value = lambda t: objective(logits + t * along, weights + t * direction, labels, penalty)  # noqa: E731
        least = value(0.0)
        too_far = lambda t: (value(t) > least + 1e-4 * t * slope) & (t > SHORTEST)  # noqa: E731
        length = jax.lax.while_loop(too_far, lambda t: t / 2, 1.0)
        moved = length > SHORTEST  # otherwise float32 resolves no further descent
        weights, logits = (jnp.where(moved, x + length * d, x) for x, d in ((weights, direction), (logits, along)))
        return weights, logits, gradient(weights, logits), moved, count + 1

    def more(carry):
        _, _, grad, moved, count = carry
        return (count < max_iterations) & (jnp.sum(grad**2) > 2 * penalty * tolerance) & moved

    logits = dot(features, weights)
    start = weights, logits, gradient(weights, logits), jnp.bool_(True), jnp.int32(0)
    weights, logits, grad, _, count = jax.lax.while_loop(more, step, start)
    return weights, objective(logits, weights, labels, penalty), jnp.sum(grad**2) / (2 * penalty), count
