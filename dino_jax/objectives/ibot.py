"""The iBOT term: the student predicts the teacher's outputs for the patches that are masked from it.

Zhou et al. 2022 (arXiv 2111.07832), and with other centering, heads and masks DINOv2 (arXiv 2304.07193, section 4).
Which patches are masked: `data.masking`. The masked student's CLS also feeds the other terms, as in both codes.

Legend: B batch, M chosen patches of the global crops, K prototypes of the patch head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dino_jax.models.network import Outputs
from dino_jax.objectives.centering import Centering
from dino_jax.objectives.objective import Objective

HIGHEST = jax.lax.Precision.HIGHEST


class PatchTerms(NamedTuple):
    """Parts of the loss, averaged in the same way; it is `entropy + kl`."""

    entropy: Array  # of the teacher's distributions, in nats
    kl: Array  # from teacher to student, in nats


def ibot_loss(
    student: Float[Array | np.ndarray, "M K"],
    log_targets: Float[Array | np.ndarray, "M K"],
    weight: Float[Array | np.ndarray, " M"],
    crops: int,
    student_temp: float = 0.1,
) -> tuple[Float[Array, ""], PatchTerms]:
    """Mean over `crops` global crops of the mean cross-entropy of their masked patches; a crop without any counts 0.

    `weight`: 1 / number of masked patches in a patch's crop, 0 for patches that do not count. No gradient flows into
    the targets. Computes in at least float32. Official: `iBOTPatchLoss.forward_masked` of DINOv2, `iBOTLoss` of iBOT.
    """
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    log_targets = jax.lax.stop_gradient(jnp.asarray(log_targets, dtype))
    scores, targets = jnp.asarray(student, dtype) / student_temp, jnp.exp(log_targets)
    agreement = jnp.einsum("mk,mk->m", targets, scores, precision=HIGHEST)
    weight = jnp.asarray(weight, dtype) / crops
    loss = jnp.sum(weight * (jax.nn.logsumexp(scores, axis=-1) - agreement))
    entropy = -jnp.sum(weight * jnp.sum(targets * log_targets, axis=-1))
    return loss, PatchTerms(entropy, jax.lax.stop_gradient(loss) - entropy)


def make(config: ConfigDict, schedules: Any) -> Objective:
    """Builds the iBOT term from `config.objective.ibot`.

    With `centering=ema` its state is a center [K], of the masked patches (DINOv2) or of all (iBOT); with `sinkhorn` it
    has none.
    """
    settings = config.objective.ibot
    K = settings.out_dim or config.head.out_dim
    centering = Centering(settings, K, config.model.dtype)

    def targets(state: Mapping[str, Array], teacher: Outputs, step: Array) -> tuple[Array, Any]:
        logits, masked = teacher.patch_logits, teacher.chosen.masked
        log_targets = centering.log_targets(state, logits, schedules.patch_temp(step), masked)
        if not centering.moving:
            return log_targets, {}
        counted = masked if settings.center_over == "masked" else jnp.ones_like(masked)
        total = jnp.where(counted[:, None], logits.astype(state["center"].dtype), 0.0).sum(0)
        return log_targets, total / jnp.maximum(counted.sum(), 1)

    def loss(student: Outputs, log_targets: Array, step: Array) -> tuple[Array, PatchTerms]:
        rows = student.cls.shape[0]
        return ibot_loss(student.patch_logits, log_targets, student.chosen.weight, 2 * rows, settings.student_temp)

    def flops(student: Outputs) -> float:
        return 2 * 2.0 * math.prod(student.patch_logits.shape)  # forward and backward

    return Objective(
        init=centering.init,
        targets=targets,
        loss=loss,
        update=centering.update,
        metrics=lambda state, loss, terms: {"patch_entropy": terms.entropy, "patch_kl": terms.kl},
        flops=flops,
        logical_axes=centering.logical_axes,
        patches="all" if centering.moving and settings.center_over == "all" else "masked",
    )
