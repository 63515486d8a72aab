"""The DINO term: cross-entropy between the teacher's centered, sharpened distributions and the student's.

Paper: section 3.1 (eq. 1 to 4), and the ablations of centering and sharpening (5.3, appendix D). A run that
fails shows one of these (K prototypes, entropies in nats):

- **uniform collapse**: every image gets the uniform distribution: entropy ln K, KL 0. Centering won over sharpening.
- **one-prototype collapse**: one prototype takes the whole batch: both entropies 0. Sharpening won over centering.
- **constant output**: neither, but every image gets the same distribution: the two entropies are equal.
- **stuck loss**: the loss stays at ln K, that of a uniform guess, although the teacher's output is informative.

Legend: B batch, C crops (2 global ones first), K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dino_jax.models.network import Outputs
from dino_jax.objectives.centering import Centering
from dino_jax.objectives.objective import Finding, Objective, Place
from dino_jax.objectives.remedies import Remedy, advice, common

HIGHEST = jax.lax.Precision.HIGHEST

NEAR = 0.01  # entropies within this fraction of ln K count as equal
FEW = math.log(2.0)  # marginal entropy of two prototypes
UNIFORM, ONE, CONSTANT, STUCK = "uniform collapse", "one-prototype collapse", "constant output", "stuck loss"


class LossTerms(NamedTuple):
    """Batch means of the parts of the loss, which is `entropy + kl`."""

    entropy: Array  # mean entropy of the teacher's distributions, in nats
    kl: Array  # mean Kullback-Leibler divergence from teacher to student, in nats
    marginal: Array  # [K], the teacher's mean distribution over the batch


def dino_loss(
    student_logits: Float[Array, "B C K"], log_targets: Float[Array, "B 2 K"], student_temp: float = 0.1
) -> tuple[Float[Array, ""], LossTerms]:
    """Cross-entropy of every student crop against the teacher's other global crops (paper, eq. 3).

    The mean over images of the mean over the 2 (C - 1) pairs (teacher view t, student view s), t != s, of the
    cross-entropy between exp(log_targets_t) and softmax(student_s / student_temp). No gradient flows into the targets.
    Computes in at least float32. Official: `DINOLoss.forward`.
    """
    dtype = jnp.promote_types(student_logits.dtype, jnp.float32)
    log_targets = jax.lax.stop_gradient(log_targets.astype(dtype))
    targets = jnp.exp(log_targets)
    student = student_logits.astype(dtype) / student_temp  # [B, C, K]

    # -sum_k q_k log softmax(z)_k = logsumexp(z) - <q, z>, since q sums to one: no [B, 2, C, K] array exists.
    agreement = jnp.einsum("btk,bck->btc", targets, student, precision=HIGHEST)
    cross_entropy = jax.nn.logsumexp(student, axis=-1)[:, None, :] - agreement  # [B, 2, C]
    other = 1.0 - jnp.eye(2, student.shape[1], dtype=dtype)  # [2, C]: pairs of different views
    loss = jnp.sum(cross_entropy * other / other.sum()) / student.shape[0]

    entropy = -jnp.sum(targets * log_targets, axis=-1).mean()
    return loss, LossTerms(entropy, jax.lax.stop_gradient(loss) - entropy, targets.mean((0, 1)))


def make(config: ConfigDict, schedules: Any) -> Objective:
    """Builds the DINO term from `config.objective.dino`.

    With `centering=ema` its state is the center [K]; with `sinkhorn` it has none.
    """
    K, settings = config.head.out_dim, config.objective.dino
    centering = Centering(settings, K, config.model.dtype)

    def targets(state: Mapping[str, Array], teacher: Outputs, step: Array) -> tuple[Array, Any]:
        logits = teacher.logits
        log_targets = centering.log_targets(state, logits, schedules.teacher_temp(step))
        return log_targets, logits.astype(state["center"].dtype).mean((0, 1)) if centering.moving else {}  # [K]

    def metrics(state: Mapping[str, Array], loss: Array, terms: LossTerms) -> dict[str, Array]:
        return {
            "teacher_entropy": terms.entropy,
            "kl": terms.kl,
            "marginal_entropy": jnp.sum(jax.scipy.special.entr(terms.marginal)),
            "ln_k_gap": math.log(K) - loss,
            **({"center_norm": jnp.linalg.norm(state["center"])} if centering.moving else {}),
        }

    def flops(student: Outputs) -> float:
        return 2 * 2 * 2.0 * math.prod(student.logits.shape)  # against both targets, forward and backward

    return Objective(
        init=centering.init,
        targets=targets,
        loss=lambda student, log_targets, step: dino_loss(student.logits, log_targets, settings.student_temp),
        update=centering.update,
        metrics=metrics,
        diagnose=lambda metrics: diagnose(metrics, config),
        flops=flops,
        logical_axes=centering.logical_axes,
        official={"center": Place("dino_loss.center", (1, K))} if centering.moving else {},
    )


def diagnose(metrics: Mapping[str, float], config: ConfigDict) -> Finding | None:
    """The collapse that one step's metrics show, if any, with what to try.

    Reads `teacher_entropy` (of each image's distribution, averaged), `marginal_entropy` (of the batch's mean
    distribution) and `kl`. Early in a run uniform outputs are normal; one prototype is a collapse at any time.
    """
    ln_k = math.log(config.head.out_dim)
    entropy, marginal, kl = (metrics[name] for name in ("teacher_entropy", "marginal_entropy", "kl"))
    found = _collapse(entropy, marginal, kl, ln_k)
    if found is None:
        return None
    shown = {"loss": entropy + kl, "teacher_entropy": entropy, "marginal_entropy": marginal, "kl": kl, "ln K": ln_k}
    return Finding(found, shown, advice(_remedies(found, config)), early=found == ONE)


def _collapse(entropy: float, marginal: float, kl: float, ln_k: float) -> str | None:
    near = NEAR * ln_k
    if marginal < FEW:
        return ONE
    if entropy > ln_k - near:
        return UNIFORM if kl < near else STUCK
    if marginal - entropy < near:
        return CONSTANT
    return STUCK if entropy + kl > ln_k - near else None


def _remedies(found: str, config: ConfigDict) -> list[Remedy]:
    """What to try, best first."""
    teacher, head, settings = config.teacher, config.head, config.objective.dino
    moving, momentum = settings.centering == "ema", settings.center_momentum
    its = common(config)
    cooler = (teacher.temp > 0.04, f"a sharper teacher: teacher.temp=0.04 (now {teacher.temp:g})")
    cooler_start = (
        teacher.warmup_temp > 0.03,
        f"a sharper start: teacher.warmup_temp=0.03 (now {teacher.warmup_temp:g}), more teacher.warmup_temp_epochs",
    )
    quicker_center = (moving and momentum > 0.9, f"objective.dino.center_momentum=0.9 (now {momentum:g})")
    warmer = (teacher.temp < 0.04, f"a softer teacher: teacher.temp=0.04 (now {teacher.temp:g})")
    fewer = (
        head.out_dim > 4096 and config.batch_size < 256,
        f"fewer prototypes: head.out_dim=4096 (now {head.out_dim})",
    )
    return {
        UNIFORM: [cooler, cooler_start, quicker_center, its["lr"], its["freeze"], its["teacher"]],
        ONE: [quicker_center, warmer, its["batch"], its["teacher"], its["lr"], its["clip"]],
        CONSTANT: [quicker_center, its["lr"], its["batch"], its["teacher"], its["clip"], its["freeze"]],
        STUCK: [its["freeze"], its["gain"], cooler_start, its["lr"], fewer, its["teacher"]],
    }[found]
