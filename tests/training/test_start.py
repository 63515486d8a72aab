"""Runs that begin from other weights: what is taken, what is adapted, what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.models import resize_pos_embed
from dino_jax.training.start import start_from
from dino_jax.training.step import init_state, make_recipe
from dino_jax.weights import importer
from dino_jax.weights.pth import write_pth
from tests.weights.test_importer import same


@pytest.fixture(scope="module")
def states():
    """`states(config)`: a fresh state of zeros for a configuration (what `start_from` fills)."""

    def make(config):
        recipe = make_recipe(config, steps_per_epoch=1)
        shapes = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
        return jax.tree.map(lambda s: jax.numpy.full(s.shape, 7, s.dtype), shapes)

    return make


@pytest.fixture
def full(reference):
    """The reference checkpoint's path and weights, with a configuration that starts from it."""
    path = reference("official_checkpoint.pth")
    weights = importer.read(path, heads=3)
    config = weights.config.copy_and_resolve_references()
    config.init_from = str(path)
    return path, weights, config


def test_everything_comes_along(full, states):
    _, weights, config = full
    state, notes = start_from(states(config), config)
    assert same(jax.device_get(state.student), weights.student)
    assert same(jax.device_get(state.teacher), weights.teacher)
    np.testing.assert_array_equal(state.objectives["dino"]["center"], weights.objectives["dino"]["center"])
    assert state.step == 7  # all else is as it was
    assert len(notes) == 1


def test_a_backbone_alone_leaves_the_head_fresh(full, states, tmp_path):
    path, weights, config = full
    from dino_jax.weights.pth import read_pth

    teacher = read_pth(path)["teacher"]
    backbone = {key: value for key, value in teacher.items() if key.startswith("backbone.")}
    write_pth(tmp_path / "b.pth", backbone)
    config.init_from = str(tmp_path / "b.pth")
    state, notes = start_from(states(config), config)
    for params in (state.student["params"], state.teacher["params"]):
        assert same(jax.device_get(params["backbone"]), weights.teacher["params"]["backbone"])
        assert all((leaf == 7).all() for leaf in jax.tree.leaves(params["head"]))
    assert (state.objectives["dino"]["center"] == 7).all()
    assert "the head is fresh" in " ".join(notes)
    assert "start equal" in " ".join(notes)


def test_another_head_is_fresh_and_said(full, states):
    _, weights, config = full
    config.head.out_dim = 48
    state, notes = start_from(states(config), config)
    assert state.student["params"]["head"]["last_layer"]["v"].shape == (48, 16)
    assert same(jax.device_get(state.student["params"]["backbone"]), weights.teacher["params"]["backbone"])
    assert "last_layer/v is [32, 16], not [48, 16]" in " ".join(notes)


def test_another_image_size_and_channels(full, states):
    _, weights, config = full
    config.crops.global_size = (24, 40)
    config.model.in_chans = 1
    state, notes = start_from(states(config), config)
    backbone, source = state.teacher["params"]["backbone"], weights.teacher["params"]["backbone"]
    np.testing.assert_array_equal(backbone["pos_embed"], resize_pos_embed(source["pos_embed"], (3, 5)))
    kernel = source["patch_embed"]["kernel"]
    np.testing.assert_allclose(backbone["patch_embed"]["kernel"], kernel.sum(axis=2, keepdims=True), atol=1e-6)
    assert "[4, 4] patches is resized to [3, 5]" in " ".join(notes)
    assert "3 channels become 1" in " ".join(notes)
    assert "head is fresh" not in " ".join(notes)


def test_another_backbone_is_refused(full, states):
    _, _, config = full
    config.model.depth = 2
    with pytest.raises(UserError, match=r"blocks_2.*unknown here") as caught:
        start_from(states(config), config)
    assert "\n" not in str(caught.value)
    config.model.depth, config.model.embed_dim = 3, 30
    with pytest.raises(UserError, match=r"is \[24\], not \[30\]"):
        start_from(states(config), config)
    config.init_from = "dino_vits17"
    with pytest.raises(UserError, match="no such file"):
        start_from(states(config), config)
