"""The EMA teacher against its closed form."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dino_jax.training.teacher import ema_teacher


def test_average_uses_the_momentum_of_the_step(x64):
    momenta = jnp.array([0.5, 0.9, 1.0])
    ema = ema_teacher(lambda step: momenta[step])
    state = ema.init({"w": jnp.array([2.0])})
    expected = 2.0
    for step, student in enumerate([1.0, -1.0, 7.0]):
        teacher, state = ema.update({"w": jnp.array([student])}, state, step=step)
        expected = float(momenta[step]) * expected + (1 - float(momenta[step])) * student
        np.testing.assert_allclose(teacher["w"], [expected], rtol=1e-12)


def test_average_of_bfloat16_weights_still_moves():
    """In bfloat16 a momentum of 0.996 towards 1.3 would stay at 1; the teacher is float32 and arrives."""
    ema = ema_teacher(lambda step: jnp.float32(0.996))
    student = {"w": jnp.array([1.3], jnp.bfloat16)}
    state = ema.init({"w": jnp.array([1.0], jnp.bfloat16)})
    for step in range(1500):
        teacher, state = ema.update(student, state, step=step)
    assert teacher["w"].dtype == jnp.float32
    np.testing.assert_allclose(teacher["w"], [1.3], atol=5e-3)
