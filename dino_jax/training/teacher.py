"""The EMA teacher as an optax-style transform, over parameters instead of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dino_jax.training.schedules import Schedule

Params = Any  # a pytree of arrays


class EmaState(NamedTuple):
    """The teacher's parameters, in at least float32: a bfloat16 average would stop moving."""

    teacher: Params


class ParameterTransform(NamedTuple):
    """`init(params) -> state` and `update(params, state, *, step) -> (teacher, state)`."""

    init: Callable[[Params], EmaState]
    update: Callable[..., tuple[Params, EmaState]]


def ema_teacher(momentum: Schedule) -> ParameterTransform:
    """teacher <- m teacher + (1 - m) student, with m the schedule's value at the global step (paper, section 3.1).

    Parameters only: the teacher has its own batch statistics. `init` copies, so that student and teacher never share
    buffers (both are donated by the train step).
    """

    def wide(x):
        return jnp.promote_types(x.dtype, jnp.float32)

    def init(params):
        return EmaState(jax.tree.map(lambda p: jnp.array(p, wide(p), copy=True), params))

    def update(params, state, *, step):
        m = momentum(step)

        def average(teacher, student):
            weight = m.astype(teacher.dtype)
            return weight * teacher + (1 - weight) * student.astype(teacher.dtype)

        teacher = jax.tree.map(average, state.teacher, params)
        return teacher, EmaState(teacher)

    return ParameterTransform(init, update)
