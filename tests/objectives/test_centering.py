"""Sinkhorn-Knopp against its definition, and over several devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.objectives.centering import sinkhorn_knopp
from dino_jax.parallel import sharding
from dino_jax.training import step as train_step
from tests.tiny import random_crops, tiny_config

TEMP = 0.05


def by_definition(logits: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Sample probabilities [M, K] in float64, with exponentials as in the paper's algorithm."""
    q = np.exp(logits.astype(np.float64) / TEMP)
    for _ in range(rounds):
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    return q * len(q)


def draw(rows: int, scale: float = 0.3) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, (rows, 7)).astype(np.float32)


def test_it_is_the_algorithm():
    logits = draw(12)
    found = jnp.exp(sinkhorn_knopp(logits, TEMP))
    np.testing.assert_allclose(found, by_definition(logits), atol=1e-6)
    np.testing.assert_allclose(jnp.exp(sinkhorn_knopp(logits, TEMP, rounds=1)), by_definition(logits, 1), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_padding_does_not_count():
    logits = draw(12)
    valid = np.arange(12) % 3 != 0
    found = jnp.exp(sinkhorn_knopp(logits, TEMP, valid))
    np.testing.assert_allclose(found[valid], by_definition(logits[valid]), atol=1e-6)
    assert np.isfinite(found).all()


def test_large_logits_do_not_overflow():
    found = sinkhorn_knopp(draw(12) + 1000, TEMP)
    np.testing.assert_allclose(jnp.exp(found), by_definition(draw(12)), atol=1e-3)


def test_it_sums_over_all_devices():
    logits, valid = draw(16), np.arange(16) % 5 != 0
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1}, jax.devices()[:4])
    rows = sharding.AXES.spec("batch")

    @jax.jit
    def spread(logits, valid):
        body = jax.shard_map(
            lambda x, v: sinkhorn_knopp(x, TEMP, v),
            mesh=mesh,
            in_specs=(rows, rows),
            out_specs=rows,
            axis_names=set(sharding.AXES.batch),
        )
        return body(logits, valid)

    found = spread(logits, valid)
    np.testing.assert_allclose(found[valid], sinkhorn_knopp(logits, TEMP, valid)[valid], atol=1e-4)


def test_a_step_with_it_is_the_same_on_several_devices():
    config = tiny_config()
    config.objective.dino.centering = "sinkhorn"
    recipe = train_step.make_recipe(config, 4)

    def step(count):
        mesh = sharding.make_mesh({"data": count, "fsdp": 1, "model": 1}, jax.devices()[:count])
        state = train_step.jit_init_state(recipe, mesh)
        assert state.objectives == {"dino": {}}
        return train_step.jit_train_step(recipe, mesh)(state, random_crops(config))[1]

    one, four = step(1), step(4)
    assert "center_norm" not in one
    for name in ("loss", "grad_norm", "teacher_entropy", "marginal_entropy"):
        np.testing.assert_allclose(one[name], four[name], rtol=2e-5, err_msg=name)
