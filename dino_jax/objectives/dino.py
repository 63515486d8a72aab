"""The DINO loss and its centre: pure functions of logits.

Legend: B batch, C crops (2 global ones first), K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


class LossTerms(NamedTuple):
    """Means over one batch; `cross_entropy = entropy + kl` over the pairs that the loss averages."""

    cross_entropy: Array  # the loss
    entropy: Array  # mean entropy of the teacher's distributions, in nats
    kl: Array  # mean Kullback-Leibler divergence from teacher to student, in nats
    marginal: Array  # [K], the teacher's mean distribution over the batch


def dino_loss(
    student_logits: Float[Array, "B C K"],
    teacher_logits: Float[Array, "B 2 K"],
    center: Float[Array, " K"],
    teacher_temp: Float[Array, ""] | float,
    student_temp: float = 0.1,
) -> LossTerms:
    """Cross-entropy of every student crop against the teacher's other global crops (paper, eq. 3).

    The mean over images of the mean over the 2 (C - 1) pairs (teacher view t, student view s), t != s, of the
    cross-entropy between softmax((teacher_t - center) / teacher_temp) and softmax(student_s / student_temp).
    No gradient flows into the teacher. Computes in at least float32. Official: `DINOLoss.forward`.
    """
    dtype = jnp.promote_types(student_logits.dtype, jnp.float32)
    teacher_logits, center = jax.lax.stop_gradient((teacher_logits.astype(dtype), center.astype(dtype)))
    log_target = jax.nn.log_softmax((teacher_logits - center) / teacher_temp, axis=-1)  # [B, 2, K]
    target = jnp.exp(log_target)
    student = student_logits.astype(dtype) / student_temp  # [B, C, K]

    # -sum_k q_k log softmax(z)_k = logsumexp(z) - <q, z>, since q sums to one: no [B, 2, C, K] array exists.
    agreement = jnp.einsum("btk,bck->btc", target, student, precision=HIGHEST)
    cross_entropy = jax.nn.logsumexp(student, axis=-1)[:, None, :] - agreement  # [B, 2, C]
    other = 1.0 - jnp.eye(2, student.shape[1], dtype=dtype)  # [2, C]: pairs of different views
    loss = jnp.sum(cross_entropy * other / other.sum()) / student.shape[0]

    entropy = -jnp.sum(target * log_target, axis=-1).mean()
    return LossTerms(loss, entropy, jax.lax.stop_gradient(loss) - entropy, target.mean((0, 1)))


def update_center(
    center: Float[Array, " K"], teacher_logits: Float[Array, "... K"], momentum: float = 0.9
) -> Float[Array, " K"]:
    """Moves the centre towards the mean of the raw teacher logits over all leading axes (paper, eq. 4).

    Under `jit` over a mesh that mean is the mean over the global batch. Official: `DINOLoss.update_center`.
    """
    batch_center = teacher_logits.astype(center.dtype).mean(tuple(range(teacher_logits.ndim - 1)))
    return center * momentum + batch_center * (1 - momentum)
