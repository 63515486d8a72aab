"""Projection head and batch norm: behavior beyond the reference tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.models import Head, build_head
from dino_jax.models.norm import BatchNorm


def test_logits_are_cosines_until_the_gain_is_trained():
    x = jax.random.normal(jax.random.key(1), (5, 12))
    fixed, free = Head(7, 16, 8), Head(7, 16, 8, norm_last_layer=False)
    variables = free.init(jax.random.key(0), x)
    assert variables["params"]["last_layer"]["g"].shape == (7, 1)
    assert variables["params"]["last_layer"]["v"].shape == (7, 8)
    assert "g" not in fixed.init(jax.random.key(0), x)["params"]["last_layer"]
    cosines = free.apply(variables, x)
    assert abs(cosines).max() <= 1
    variables["params"]["last_layer"]["g"] *= 3
    np.testing.assert_allclose(free.apply(variables, x), 3 * cosines, rtol=1e-5)


def test_head_is_finite_for_a_zero_feature():
    head, x = Head(7, 16, 8), jnp.zeros((2, 12))
    variables = head.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: head.apply(v, x).sum())(variables)
    assert not head.apply(variables, x).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_last_layer_starts_as_torch_does():
    v = Head(512, 16, 64).init(jax.random.key(0), jnp.zeros((1, 12)))["params"]["last_layer"]["v"]
    assert abs(v).max() <= 1 / 8
    assert abs(v.std() * 8 * 3**0.5 - 1) < 4 * np.sqrt(0.2 / v.size)


def test_bfloat16_head_gives_float32_logits():
    x = jax.random.normal(jax.random.key(1), (5, 12))
    head = Head(7, 16, 8, dtype=jnp.bfloat16, use_bn=True)
    variables = head.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert head.apply(variables, x).dtype == jnp.float32


def test_head_names_follow_torch_sequential():
    config = default()
    config.head.update({"out_dim": 7, "hidden_dim": 16, "bottleneck_dim": 8})
    names = {}
    for use_bn in (False, True):
        config.head.use_bn = use_bn
        shapes = jax.eval_shape(build_head(config).init, jax.random.key(0), jnp.zeros((2, 12)))
        names[use_bn] = sorted(shapes["params"])
    assert names[False] == ["last_layer", "mlp_0", "mlp_2", "mlp_4"]
    assert names[True] == ["last_layer", "mlp_0", "mlp_1", "mlp_3", "mlp_4", "mlp_6"]


def test_batch_norm_moves_by_the_unbiased_variance():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 6))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    assert not variables["batch_stats"]["mean"].any()
    assert (variables["batch_stats"]["var"] == 1).all()
    out, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
    flat = np.asarray(x).reshape(-1, 6)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(out.reshape(-1, 6).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(norm.apply(variables, x, True), out)  # frozen statistics: the same output


def test_batch_norm_of_one_value_is_an_error():
    with pytest.raises(UserError, match="batch_size"):
        BatchNorm().init(jax.random.key(0), jnp.ones((1, 3)), True)
