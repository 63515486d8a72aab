"""The DINO term against its formula, and what its record gives to the step, the watch and the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.models.network import Outputs
from dino_jax.objectives.centering import centered, moved
from dino_jax.objectives.dino import dino_loss
from dino_jax.objectives.objective import make_objectives
from dino_jax.training.schedules import make_schedules
from tests.tiny import tiny_config

B, C, K = 3, 4, 7


@pytest.fixture
def logits():
    """Student [B, C, K], teacher [B, 2, K], center [K]."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, C, K), (B, 2, K), (K,))]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_closed_form(logits):
    """Equation 3, pair by pair."""
    student, teacher, center = logits
    loss, terms = dino_loss(student, centered(teacher, center, 0.04), 0.1)
    q, p = softmax((teacher - center) / 0.04), softmax(student / 0.1)
    pairs = [(t, s) for t in range(2) for s in range(C) if s != t]
    expected = np.mean([-(q[:, t] * np.log(p[:, s])).sum(-1).mean() for t, s in pairs])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.entropy, -(q * np.log(q + 1e-30)).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(terms.entropy + terms.kl, loss, rtol=1e-6)
    np.testing.assert_allclose(terms.marginal, q.mean((0, 1)), rtol=1e-4, atol=1e-7)


def test_no_gradient_into_the_teacher(logits):
    student, *frozen = logits
    grads = jax.grad(lambda t, c: dino_loss(student, centered(t, c, 0.04))[0], (0, 1))(*frozen)
    assert not any(np.any(grad) for grad in grads)
    log_targets = centered(*frozen, 0.04)
    assert not np.any(jax.grad(lambda targets: dino_loss(student, targets)[0])(log_targets))


def test_center_moves_towards_the_mean_of_the_raw_logits(logits):
    _, teacher, center = logits
    expected = 0.9 * center + 0.1 * teacher.mean((0, 1))
    np.testing.assert_allclose(moved(center, teacher.mean((0, 1)), 0.9), expected, rtol=1e-5)


def test_half_precision_is_computed_in_float32(logits):
    student, teacher, center = (jnp.asarray(x, jnp.bfloat16) for x in logits)
    loss, terms = dino_loss(student, centered(teacher, center, 0.04))
    assert {x.dtype for x in (loss, *terms)} == {jnp.dtype("float32")}


def test_the_record_uses_the_center_before_the_step_and_its_schedule(logits):
    config = tiny_config()
    config.head.out_dim = K
    config.teacher.update({"warmup_temp": 0.02, "temp": 0.08, "warmup_temp_epochs": 2})
    [term] = make_objectives(config, make_schedules(config, steps_per_epoch=4))
    student, teacher, center = logits
    assert term.init().keys() == {"center"} and not np.any(term.init()["center"])
    outputs = Outputs(np.zeros((B, 2, 5), np.float32), teacher)
    for step, temp in ((0, 0.02), (4, 0.08)):
        targets, statistics = term.targets({"center": center}, outputs, jnp.int32(step))
        loss, terms = term.loss(Outputs(np.zeros((B, C, 5), np.float32), student), targets, jnp.int32(step))
        expected, _ = dino_loss(student, centered(teacher, center, temp), config.objective.dino.student_temp)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    after = term.update({"center": center}, statistics)
    np.testing.assert_allclose(after["center"], moved(center, teacher.mean((0, 1)), 0.9), rtol=1e-6)
    metrics = term.metrics(after, loss, terms)
    np.testing.assert_allclose(metrics["center_norm"], np.linalg.norm(after["center"]), rtol=1e-6)
    np.testing.assert_allclose(metrics["ln_k_gap"], np.log(K) - loss, rtol=1e-5)
