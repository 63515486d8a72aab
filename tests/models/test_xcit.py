"""XCiT: interface, drop path, position encoding at any size. test_model_peers.py checks its numbers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.models import XCiT

tiny = partial(XCiT, embed_dim=32, depth=1, heads=2, eta=1.0, patch_size=8)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 32, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(tiny().init)(jax.random.key(0), images)


def test_one_interface(variables, images):
    model = tiny()

    @jax.jit
    def run(variables, images):
        tokens = model.apply(variables, images, 2, method="tokens")
        return model.apply(variables, images), tokens, model.apply(variables, images, method="attention")

    feature, tokens, last = run(variables, images)
    assert [x.shape for x in tokens] == [(2, 4, 32), (2, 4, 0, 32), (2, 4, 4, 2, 32)]
    assert last.shape == (4, 2, 1, 1 + 8)
    np.testing.assert_allclose(feature, tokens.cls[-1], atol=1e-5)
    shown = model.apply(variables, images, method="cls_attention")
    np.testing.assert_allclose(shown, last[:, :, 0, 1:].reshape(4, 2, 4, 2), atol=1e-6)
    np.testing.assert_allclose(last.sum(-1), 1, atol=1e-5)
    earlier = model.apply(variables, images, -2, method="attention")
    np.testing.assert_array_equal(earlier, model.apply(variables, images, 0, method="attention"))
    assert not np.allclose(earlier, last)
    assert model.depth == 1
    assert model.patch_size == 8


def test_each_branch_has_its_drop_path(variables, images):
    run, keep = jax.jit(tiny().apply), jnp.ones((1, 3, 4))
    plain = run(variables, images, keep)
    np.testing.assert_allclose(plain, run(variables, images), atol=1e-6)
    for branch in range(3):
        dropped = run(variables, images, keep.at[0, branch, 2].set(0))
        changed = abs(dropped - plain).max(axis=1) > 1e-4
        np.testing.assert_array_equal(changed, [False, False, True, False])
        without = jax.tree.map(lambda x: x, variables)
        without["params"]["blocks_0"][f"gamma{branch + 1}"] *= 0  # gamma i belongs to branch i
        np.testing.assert_allclose(dropped[2], run(without, images)[2], atol=1e-5)


def test_initialization_is_the_official_one(variables):
    block = variables["params"]["blocks_0"]
    assert block["attn"]["temperature"].shape == (2, 1, 1)
    assert (block["attn"]["temperature"] == 1).all()
    assert (block["gamma3"] == 1).all()
    assert abs(block["local_mp"]["conv1"]["kernel"]).max() < 1 / 3
    kernel = block["attn"]["qkv"]["kernel"]
    assert abs(kernel.std() / 0.02 - 1) < 4 / np.sqrt(2 * kernel.size)


def test_training_moves_every_statistic(variables, images):
    model = tiny()
    _, moved = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
    still = jax.tree.map(lambda a, b: bool((a == b).any()), moved["batch_stats"], variables["batch_stats"])
    assert not any(jax.tree.leaves(still))
    assert sorted(moved["batch_stats"]) == ["blocks_0", "patch_embed"]


def test_remat_wraps_every_block_and_changes_no_name(variables, images):
    remat = tiny(depth=2, remat=True)
    same = jax.eval_shape(tiny(depth=2).init, jax.random.key(0), images)
    assert jax.tree.structure(same) == jax.tree.structure(jax.eval_shape(remat.init, jax.random.key(0), images))
    run = partial(remat.apply, train=True, mutable=["batch_stats"])
    program, (_, moved) = jax.make_jaxpr(run, return_shape=True)(same, images, jnp.ones((2, 3, 4)))
    saved = [e for e in program.eqns if "remat" in e.primitive.name or "checkpoint" in e.primitive.name]
    assert sum("dot_general" in str(e.params["jaxpr"]) for e in saved) == 2  # the others are GELUs
    assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(same["batch_stats"])


def test_bad_requests_are_one_clear_line(variables, images):
    with pytest.raises(UserError, match="patches of 8 or 16"):
        tiny(patch_size=4).init(jax.random.key(0), images)
    with pytest.raises(UserError, match="30 x 16 pixels"):
        tiny().apply(variables, images[:, :30])
    with pytest.raises(UserError, match="last 3 blocks"):
        tiny().apply(variables, images, 3, method="tokens")
    with pytest.raises(UserError, match="block 5"):
        tiny().apply(variables, images, 5, method="attention")
