"""KoLeo: the official numbers, the closed form, and a run that learns with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.data.arrays_source import ArraySource
from dino_jax.errors import UserError
from dino_jax.models.network import Outputs
from dino_jax.objectives.koleo import koleo, nearest
from dino_jax.objectives.objective import make_objectives
from dino_jax.parallel import sharding
from dino_jax.tools.plan import compiler
from dino_jax.training import step as train_step
from dino_jax.training.loop import train
from dino_jax.training.metrics import read_metrics
from tests.models.torch_names import section
from tests.tiny import random_crops, tiny_config

CASES = ("plain", "scaled", "duplicates", "near_duplicates", "tiny_norms", "single", "pair")


@pytest.mark.parametrize("case", CASES)
def test_the_official_neighbors(load_reference, x64, case):
    data = section(load_reference("family/koleo.npz"), f"{case}/")
    unit = data["in"] / np.maximum(np.linalg.norm(data["in"], axis=1, keepdims=True), 1e-8)
    np.testing.assert_array_equal(nearest(jnp.asarray(unit)), data["neighbour"])


@pytest.mark.parametrize("case", ["plain", "scaled", "tiny_norms", "pair"])
def test_official_numbers_in_float32(load_reference, case):
    data = load_reference("family/koleo.npz")
    loss, grad = jax.value_and_grad(koleo)(data[f"{case}/in"].astype(np.float32))
    largest = np.abs(data[f"{case}/grad"]).max()
    np.testing.assert_allclose(loss, data[f"{case}/loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(grad, data[f"{case}/grad"], rtol=0, atol=1e-5 * largest)


def test_closed_form():
    """Minus the mean log of each unit vector's distance to its nearest other one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 10 * np.eye(6)
    np.testing.assert_allclose(koleo(x), -np.log(distances.min(axis=1)).mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_duplicates_are_finite_in_every_type(dtype):
    x = jnp.ones((4, 8), dtype)
    loss, grad = jax.value_and_grad(koleo)(x)
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert dtype == "float16" or np.isfinite(grad).all()  # float16 cannot hold what reaches 1e8


def koleo_config(weight: float = 0.1):
    config = tiny_config()
    config.objective.koleo.weight = weight
    return config


def test_the_two_global_views_count_and_no_other_crop():
    rng = np.random.default_rng(0)
    cls = jnp.asarray(rng.standard_normal((4, 5, 8)), jnp.float32)
    _, term = make_objectives(koleo_config())
    assert (term.name, term.weight) == ("koleo", 0.1)
    outputs = Outputs(cls, jnp.zeros((4, 5, 64)))
    loss, _ = term.loss(outputs, None, jnp.int32(0))
    np.testing.assert_allclose(loss, koleo(cls[:, 0]) + koleo(cls[:, 1]), rtol=1e-6)


@pytest.fixture(scope="module")
def images():
    return ArraySource(np.random.default_rng(0).integers(0, 256, (64, 40, 36, 3), np.uint8))


def test_a_run_logs_each_loss_and_resumes_to_the_same_bits(images, tmp_path):
    config = koleo_config(0.3)
    config.epochs = 1
    config.run.mesh.data = 2
    straight = train(config, tmp_path / "straight", source=images)
    for record in read_metrics(tmp_path / "straight"):
        total = record["loss_dino"] + 0.3 * record["loss_koleo"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert record["loss_dino"] == pytest.approx(record["teacher_entropy"] + record["kl"], rel=1e-5)
    for config.run.stop_after in (2, 0):
        resumed = train(config, tmp_path / "resumed", source=images)
    assert int(resumed.step) == 4
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def gradients(config, **sizes):
    """Parameters' gradients and the losses of one step, by SGD at lr 1."""
    config.optim.update({"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "weight_decay_end": 0.0})
    config.optim.update({"clip_grad": 0.0, "warmup_epochs": 0, "freeze_last_layer": 0, "min_lr": 1.0})
    config.optim.lr = 256 / config.batch_size
    config.run.mesh.update({"data": 1, **sizes})
    mesh, recipe = sharding.make_mesh(config.run.mesh), train_step.make_recipe(config, 4)
    state = train_step.jit_init_state(recipe, mesh)
    before = jax.device_get(state.student["params"])
    after, metrics = train_step.jit_train_step(recipe, mesh)(state, random_crops(config))
    moved = jax.tree.map(lambda a, b: a - b, before, jax.device_get(after.student["params"]))
    return moved, jax.device_get(metrics)


@pytest.mark.extra
def test_gradients_through_remat_and_sharded_prototypes_are_the_same():
    plain, metrics = gradients(koleo_config(1.0))
    without, _ = gradients(koleo_config(0.0))
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, without)
    assert difference["backbone"]["norm"]["scale"] > 1e-3  # the term reaches the backbone ...
    assert max(jax.tree.leaves(difference["head"])) < 1e-6  # ... and not the head
    recomputed = koleo_config(1.0)
    recomputed.run.remat = "blocks"
    for config, sizes in ((recomputed, {}), (koleo_config(1.0), {"model": 2})):
        again, figures = gradients(config, **sizes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), again, plain)
        np.testing.assert_allclose(figures["loss_koleo"], metrics["loss_koleo"], rtol=1e-5)


def test_neighbors_are_those_of_the_same_device():
    """Over two devices the loss is the mean of two halves' losses, not the whole batch's."""
    config = koleo_config(1.0)
    config.model.drop_path = 0.0
    _, metrics = gradients(config, data=2)
    halves = []
    for half in (slice(None, 8), slice(8, None)):
        recipe = train_step.make_recipe(config, 4)
        variables = train_step.init_state(recipe, jax.random.key(config.seed)).student
        crops = [crop[half] for crop in random_crops(config)]
        outputs, _ = recipe.network.apply(variables, crops, train=True, mutable=["batch_stats"])
        halves.append(float(koleo(outputs.cls[:, 0]) + koleo(outputs.cls[:, 1])))
    np.testing.assert_allclose(metrics["loss_koleo"], np.mean(halves), rtol=1e-4)


def test_a_weight_of_0_leaves_state_metrics_and_program_as_they_are():
    def facts(config):
        recipe = train_step.make_recipe(config, 4)
        mesh = sharding.make_mesh(config.run.mesh, jax.devices()[:2])
        crops = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in random_crops(config)]
        state = train_step.abstract_state(recipe, mesh)
        lowered = train_step.jit_train_step(recipe, mesh).lower(state, crops)
        return state.objectives.keys(), lowered.out_info[1].keys(), lowered.as_text()

    off, on = facts(koleo_config(0.0)), facts(koleo_config(0.1))
    without_key = tiny_config()
    with without_key.unlocked():
        del without_key.objective.koleo
    assert off == facts(without_key)
    assert off[0] == {"dino"} and not any(name.startswith("loss_") for name in off[1])
    assert on[1] - off[1] == {"loss_dino", "loss_koleo"}
    assert on[2] != off[2]


@pytest.mark.parametrize("accum", [1, 2])
def test_one_image_a_device_is_refused_before_the_workdir_is_taken(images, tmp_path, accum):
    config = koleo_config()
    config.batch_size, config.run.mesh.data, config.run.accum_steps = 4 * accum, 4, accum
    for start in (
        lambda: train(config, tmp_path / "run", source=images),
        lambda: compiler.abstract_step(config, jax.devices()[:4], 4),
    ):
        with pytest.raises(UserError, match=rf"^batch_size={4 * accum}: objective\.koleo .* use at least {8 * accum}"):
            start()
    assert not (tmp_path / "run").exists()


def test_flops_are_those_of_the_products_of_two_views():
    _, term = make_objectives(koleo_config())
    shapes = Outputs(jax.ShapeDtypeStruct((4, 3, 8), np.float32), jax.ShapeDtypeStruct((4, 3, 16), np.float32))
    assert term.flops(shapes) == 2 * (2 * 4 * 4 * 8)
