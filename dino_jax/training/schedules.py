"""Schedules set in epochs, as functions of the step (optax schedules: step -> value)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.config import LARGEST
from dino_jax.errors import UserError

Schedule = Callable[..., jnp.ndarray]


class Schedules(NamedTuple):
    """The scheduled values of a run, each a function of the global step."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule  # of the teacher's moving average
    teacher_temp: Schedule


def cosine(base: float, final: float, steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear from 0 to `base` over `warmup_steps` (both ends included), then half a cosine towards `final`.

    With n = steps - warmup_steps, the value at step warmup_steps + i is final + (base - final) / 2 (1 + cos(pi i / n)),
    so `final` itself is never reached. Official: `utils.cosine_scheduler`.
    """
    n = max(steps - warmup_steps, 1)

    def schedule(step):
        step = jnp.asarray(step) * 1.0
        progress = jnp.clip((step - warmup_steps) / n, 0.0, 1.0)
        value = final + 0.5 * (base - final) * (1 + jnp.cos(math.pi * progress))
        warmup = base * step / max(warmup_steps - 1, 1)
        return jnp.where(step < warmup_steps, warmup, value)

    return schedule


def linear_per_epoch(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> Schedule:
    """`np.linspace(start, end, warmup_epochs)` one value per epoch, then `end`. Official: `DINOLoss.__init__`."""

    def schedule(step):
        epoch = jnp.asarray(step) // steps_per_epoch
        value = start + (end - start) * epoch / max(warmup_epochs - 1, 1)
        return jnp.where(epoch < warmup_epochs, value, end)

    return schedule


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> Schedules:
    """The four schedules of a run. The learning rate is scaled by batch_size / 256, its minimum is not.

    Raises:
      UserError: more steps than int32 counts.
    """
    steps = config.epochs * steps_per_epoch
    if steps > LARGEST:
        raise UserError(
            f"epochs={config.epochs}: {steps} steps are more than the {LARGEST} that can be counted: lower it"
        )
    optim, teacher = config.optim, config.teacher
    return Schedules(
        lr=cosine(
            optim.lr * config.batch_size / 256, optim.min_lr, steps, min(optim.warmup_epochs * steps_per_epoch, steps)
        ),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, steps),
        momentum=cosine(teacher.momentum, teacher.momentum_end, steps),
        teacher_temp=linear_per_epoch(teacher.warmup_temp, teacher.temp, teacher.warmup_temp_epochs, steps_per_epoch),
    )
