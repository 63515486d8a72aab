"""The sharded step: same numbers on any devices and with accumulation, and what its compiled program contains."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.parallel import sharding
from dino_jax.training import step as train_step
from tests.tiny import random_crops, tiny_config


def mesh_of(devices: int, **sizes):
    return sharding.make_mesh({"data": -1, "fsdp": 1, "model": 1, **sizes}, jax.devices()[:devices])


def gradients(config, mesh):
    """The step's own gradients: SGD without decay or momentum, at lr 1, moves each weight by them."""
    config.optim.update({"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "weight_decay_end": 0.0})
    config.optim.update({"clip_grad": 0.0, "warmup_epochs": 0, "freeze_last_layer": 0, "min_lr": 1.0})
    config.optim.lr = 256 / config.batch_size
    recipe = train_step.make_recipe(config, 4)
    state = train_step.jit_init_state(recipe, mesh)
    before = jax.device_get(state.student["params"])
    after, metrics = train_step.jit_train_step(recipe, mesh)(state, random_crops(config))
    moved = jax.tree.map(lambda a, b: a - b, before, jax.device_get(after.student["params"]))
    return moved, jax.device_get(metrics), jax.device_get(after.objectives["dino"]["center"])


@pytest.fixture(scope="module")
def one_device():
    return gradients(tiny_config(), mesh_of(1))


@pytest.mark.parametrize(
    ("devices", "accum", "sizes"),
    [
        pytest.param(8, 1, {}, id="8 devices"),
        pytest.param(1, 4, {}, id="4 microbatches"),
        pytest.param(4, 2, {"fsdp": 2}, id="fsdp and microbatches", marks=pytest.mark.extra),
        pytest.param(8, 1, {"fsdp": 8}, id="fsdp alone", marks=pytest.mark.extra),
        pytest.param(4, 1, {"model": 2}, id="sharded prototypes", marks=pytest.mark.extra),
        pytest.param(8, 1, {"model": 8}, id="nothing but sharded prototypes", marks=pytest.mark.extra),
        pytest.param(8, 2, {"fsdp": 2, "model": 2}, id="all at once", marks=pytest.mark.extra),
    ],
)
def test_same_gradients_however_it_is_computed(one_device, devices, accum, sizes):
    config = tiny_config()
    config.run.accum_steps = accum
    grads, metrics, center = gradients(config, mesh_of(devices, **sizes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, one_device[0])
    np.testing.assert_allclose(center, one_device[2], rtol=1e-5, atol=1e-7)
    for name in ("loss", "teacher_entropy", "kl"):
        np.testing.assert_allclose(metrics[name], one_device[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.extra
def test_remat_changes_no_gradient(one_device):
    config = tiny_config()
    config.run.remat = "blocks"
    grads, metrics, _ = gradients(config, mesh_of(8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, one_device[0])
    np.testing.assert_allclose(metrics["loss"], one_device[1]["loss"], rtol=1e-5)


@pytest.mark.extra
def test_batch_norm_sees_the_whole_batch_on_any_devices():
    """Its statistics, and the gradients through them, are those of all rows."""
    results = []
    for devices, sizes in ((1, {}), (8, {"fsdp": 2})):
        config = tiny_config()
        config.head.use_bn = True
        results.append(gradients(config, mesh_of(devices, **sizes)))
    (one, one_metrics, _), (eight, eight_metrics, _) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5), eight, one)
    np.testing.assert_allclose(eight_metrics["loss"], one_metrics["loss"], rtol=1e-5)


def test_compiled_step_shares_the_work_and_gathers_nothing():
    """On 4 devices: no all-gather, a quarter of the FLOPs each, and only the reductions of data parallelism."""
    config = tiny_config()
    recipe = train_step.make_recipe(config, 4)
    crops = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in random_crops(config)]

    def compiled(devices):
        mesh = mesh_of(devices)
        state = train_step.abstract_state(recipe, mesh)
        return train_step.jit_train_step(recipe, mesh).lower(state, crops).compile()

    one, four = compiled(1), compiled(4)
    text = four.as_text()
    assert not re.findall(r"\b(all-gather|all-to-all|collective-permute)\b", text)
    share = four.cost_analysis()["flops"] / one.cost_analysis()["flops"]
    assert 0.25 <= share < 0.30  # the optimizer's work is not shared
    reduced = sum(map(_elements, re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)))
    params = train_step.abstract_state(recipe, mesh_of(1)).student["params"]
    backbone, head = (sum(x.size for x in jax.tree.leaves(params[part])) for part in ("backbone", "head"))
    center = metrics = config.head.out_dim  # the mean target's entropy is the only metric that is not a few scalars
    assert backbone + head + center <= reduced <= backbone + head + center + metrics + 8  # each gradient once


def _elements(shapes: str) -> int:
    """Elements in the result of an HLO instruction: `f32[2,3]{1,0}` or a tuple of these."""
    return sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes))


@pytest.fixture(scope="module")
def tiny():
    """A recipe, a state and the jitted step on one device."""
    config = tiny_config()
    config.optim.warmup_epochs = 0
    recipe = train_step.make_recipe(config, 4)
    step = jax.jit(lambda state, crops: train_step.train_step(recipe, state, crops))
    return recipe, train_step.init_state(recipe, jax.random.key(0)), step


def test_student_and_teacher_start_equal_and_apart(tiny):
    _, state, _ = tiny
    jax.tree.map(np.testing.assert_array_equal, state.student["params"], state.ema.teacher)
    ours, theirs = (jax.tree.leaves(x) for x in (state.student["params"], state.ema.teacher))
    assert all(a is not b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient alone"])
def test_a_non_finite_step_changes_nothing_but_the_counts(tiny, where):
    recipe, state, step = tiny
    crops = random_crops(recipe.config)
    if where == "loss":
        crops[1][3, 0, 5, 5, 0] = np.nan
    else:  # a bottleneck of zeros passes a gradient of 1e12 through its norm, and large hidden values do the rest
        state = jax.tree.map(jnp.copy, state)
        head = state.student["params"]["head"]
        head["mlp_4"] = jax.tree.map(jnp.zeros_like, head["mlp_4"])
        head["mlp_0"], head["mlp_2"] = jax.tree.map(lambda x: x * 1e15, (head["mlp_0"], head["mlp_2"]))
    after, metrics = step(state, crops)
    assert np.isfinite(metrics["loss"]) == (where == "gradient alone")
    assert not np.isfinite(metrics["grad_norm"])
    assert int(after.step) == 1
    assert int(after.bad_steps) == int(metrics["bad_steps"]) == 1
    unchanged = after.replace(step=state.step, bad_steps=state.bad_steps)
    jax.tree.map(np.testing.assert_array_equal, unchanged, state)
    again, metrics = step(after, crops)
    assert int(again.bad_steps) == int(metrics["bad_steps"]) == 2
    healthy, metrics = step(again.replace(student=tiny[1].student), random_crops(recipe.config))
    assert int(healthy.bad_steps) == 0
    assert np.isfinite(metrics["loss"])


def test_frozen_last_layer_waits_then_moves(tiny):
    """No update, moment or decay while frozen; every other tensor moves at once."""
    recipe, state, step = tiny
    start = state.student["params"]
    frozen = recipe.config.optim.freeze_last_layer * 4
    for i in range(frozen + 1):
        state, _ = step(state, random_crops(recipe.config, seed=i))
        same = np.array_equal(state.student["params"]["head"]["last_layer"]["v"], start["head"]["last_layer"]["v"])
        assert same == (i < frozen)
        assert not np.array_equal(state.student["params"]["backbone"]["cls_token"], start["backbone"]["cls_token"])


def test_metrics_agree_with_each_other(tiny):
    recipe, state, step = tiny
    _, metrics = step(state, random_crops(recipe.config))
    ln_k = np.log(recipe.config.head.out_dim)
    np.testing.assert_allclose(metrics["loss"], metrics["teacher_entropy"] + metrics["kl"], rtol=1e-6)
    np.testing.assert_allclose(metrics["ln_k_gap"], ln_k - metrics["loss"], rtol=1e-5)
    assert 0 <= metrics["teacher_entropy"] <= metrics["marginal_entropy"] <= ln_k + 1e-5
    assert metrics["kl"] >= -1e-6


def test_drop_path_masks_belong_to_their_example_and_keep_the_mean(tiny):
    """One draw per sample, crop and branch: the first block never drops, the last at the full rate."""
    config = tiny_config(drop_path=0.4)
    recipe = train_step.make_recipe(config, 4)
    masks = np.asarray(train_step.draw_drop_path(recipe, jax.random.key(1), 500))
    assert masks.shape == (2, 2, 500, 4)
    np.testing.assert_array_equal(masks[0], 1)
    np.testing.assert_allclose(np.unique(masks[1]), [0, 1 / 0.6], rtol=1e-6)
    deviation = np.sqrt(0.4 * 0.6 / masks[1].size) / 0.6
    assert abs(masks[1].mean() - 1) < 4 * deviation
    np.testing.assert_array_less(np.abs(masks[1].mean(1) - 1), 4 * deviation * 8**0.5)  # of each branch and crop
    together = np.corrcoef(masks[1].transpose(0, 2, 1).reshape(8, -1))  # no two share their draws
    np.testing.assert_array_less(np.abs(together - np.eye(8)), 4 / np.sqrt(500))
    rows = jax.NamedSharding(mesh_of(4), jax.P(None, None, "data"))
    placed = jax.jit(lambda key: train_step.draw_drop_path(recipe, key, 500), out_shardings=rows)(jax.random.key(1))
    np.testing.assert_array_equal(placed, masks)


def test_bfloat16_keeps_parameters_center_and_loss_in_float32():
    config = tiny_config(dtype="bfloat16")
    recipe = train_step.make_recipe(config, 4)
    state, metrics = jax.eval_shape(
        lambda: train_step.train_step(
            recipe,
            train_step.init_state(recipe, jax.random.key(0)),
            [jnp.asarray(c, jnp.bfloat16) for c in random_crops(config)],
        )
    )
    assert {x.dtype for x in jax.tree.leaves((state.student, state.ema, state.objectives))} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
