"""Schedules set in epochs, as functions of the step (optax schedules: step -> value)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.config import LARGEST, lr_scale
from dino_jax.errors import UserError

Schedule = Callable[..., jnp.ndarray]


class Schedules(NamedTuple):
    """The scheduled values of a run, each a function of the global step."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule  # of the teacher's moving average
    teacher_temp: Schedule
    patch_temp: Schedule  # the teacher's for patches


def cosine(base: float, final: float, steps: int, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Linear from `start` to `base` over `warmup_steps` (both ends included), then half a cosine towards `final`.

    With n = steps - warmup_steps, the value at step warmup_steps + i is final + (base - final) / 2 (1 + cos(pi i / n)),
    so `final` itself is reached only after the last step. Official: `utils.cosine_scheduler`, and `CosineScheduler` of
    DINOv2.
    """
    n = max(steps - warmup_steps, 1)

    def schedule(step):
        step = jnp.asarray(step) * 1.0
        progress = jnp.clip((step - warmup_steps) / n, 0.0, 1.0)
        value = final + 0.5 * (base - final) * (1 + jnp.cos(math.pi * progress))
        warmup = start + (base - start) * step / max(warmup_steps - 1, 1)
        return jnp.where(step < warmup_steps, warmup, value)

    return schedule


def stairs(start: float, end: float, count: int, each: int) -> Schedule:
    """`np.linspace(start, end, count)`, each value for `each` steps, then `end`.

    Official: `DINOLoss.__init__` (one value per epoch); DINOv2's temperature has one per step.
    """

    def schedule(step):
        stair = jnp.asarray(step) // each
        value = start + (end - start) * stair / max(count - 1, 1)
        return jnp.where(stair < count, value, end)

    return schedule


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> Schedules:
    """The schedules of a run. The learning rate is scaled by the batch size, its minimum is not.

    Raises:
      UserError: more steps than int32 counts.
    """
    steps = config.epochs * steps_per_epoch
    if steps > LARGEST:
        raise UserError(
            f"epochs={config.epochs}: {steps} steps are more than the {LARGEST} that can be counted: lower it"
        )
    optim, teacher = config.optim, config.teacher
    scale = lr_scale(config.batch_size, optim.lr_scaling)
    warmup = teacher.warmup_temp_epochs
    count, each = {"epoch": (warmup, steps_per_epoch), "step": (warmup * steps_per_epoch, 1)}[teacher.warmup_temp_by]
    ibot = config.objective.ibot
    patch_temp = stairs(ibot.warmup_temp or teacher.warmup_temp, ibot.temp or teacher.temp, count, each)
    delay = ibot.start_epoch * steps_per_epoch
    return Schedules(
        lr=cosine(optim.lr * scale, optim.min_lr, steps, min(optim.warmup_epochs * steps_per_epoch, steps)),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, steps),
        momentum=cosine(teacher.momentum, teacher.momentum_end, steps),
        teacher_temp=stairs(teacher.warmup_temp, teacher.temp, count, each),
        patch_temp=lambda step: patch_temp(jnp.maximum(step - delay, 0)),
    )
