"""Equality with the official implementation's numbers: every file under `$DINO_REFERENCE` (default tests/reference).

All sizes are read from the files; a file that is absent there is skipped.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.losses import dino_loss, update_center
from dino_jax.schedules import cosine
from dino_jax.train_step import make_recipe, state_from_student, train_step
from tests.models.torch_names import section, to_variables

OPTIMISERS = ("adamw", "sgd", "lars")


def test_schedules(load_reference, x64):
    data = load_reference("schedules.npz")
    for name in {key.split("/")[0] for key in data}:
        base, final, epochs, steps_per_epoch, warmup_epochs = data[f"{name}/args"]
        schedule = cosine(base, final, int(epochs * steps_per_epoch), int(warmup_epochs * steps_per_epoch))
        values = jax.vmap(schedule)(jnp.arange(len(data[f"{name}/values"])))
        np.testing.assert_allclose(values, data[f"{name}/values"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-8)])
def test_loss(load_reference, dtype, tolerance):
    data = load_reference("loss.npz")
    with jax.enable_x64(dtype == "float64"):
        check_loss(data, dtype, tolerance)


def check_loss(data: dict[str, np.ndarray], dtype: str, tolerance: float) -> None:
    """Loss, its gradient and the centre over consecutive steps; the files keep logits crop-major."""
    temps = data["teacher_temp_per_epoch"]
    center = jnp.zeros(data["step0/student"].shape[-1], dtype)
    batch = data["step0/teacher"].shape[0] // 2

    def batch_major(logits):
        return logits.reshape(-1, batch, logits.shape[-1]).swapaxes(0, 1).astype(dtype)  # [C*B, K] -> [B, C, K]

    @jax.jit
    def run(student, teacher, center, temp):
        def loss(s):
            return dino_loss(s, teacher, center, temp).cross_entropy

        return *jax.value_and_grad(loss)(student), update_center(center, teacher)

    for step, temp in enumerate(temps):
        student, teacher = (batch_major(data[f"step{step}/{who}"]) for who in ("student", "teacher"))
        loss, grad, center = run(student, teacher, center, temp)
        expected = data[f"step{step}/loss"]
        np.testing.assert_allclose(loss, expected, rtol=0, atol=tolerance * max(1, abs(expected)))
        np.testing.assert_allclose(grad, batch_major(data[f"step{step}/grad_student"]), rtol=0, atol=tolerance)
        np.testing.assert_allclose(center, data[f"step{step}/center_after"][0], rtol=0, atol=tolerance)


def trajectory_config(said: dict, dtype: str):
    """The configuration that a trajectory's file describes."""
    config = default()
    config.epochs, config.batch_size = said["epochs"], said["batch"]
    model = {"embed_dim": said["dim"], "patch_size": said["patch"], "drop_path": said["drop_path"], "dtype": dtype}
    config.model.update({key: said[key] for key in ("depth", "heads")} | model)
    config.head.update({"out_dim": said["K"], "hidden_dim": said["hidden"], "bottleneck_dim": said["bottleneck"]})
    config.head.norm_last_layer = said["norm_last_layer"]
    config.crops.update({"global_size": (said["image"],) * 2, "local_size": (said["local"],) * 2})
    config.crops.local_count = said["crops"] - 2
    config.optim.update({"name": said["optimizer"], "clip_grad": said["clip"], "min_lr": said["min_lr"]})
    config.optim.update({"weight_decay": said["wd"], "weight_decay_end": said["wd_end"]})
    config.optim.lr = said["lr"] * 256 / said["batch"]  # the files give the scaled learning rate
    config.optim.update({"warmup_epochs": said["warmup_epochs"], "freeze_last_layer": said["freeze_last_layer_epochs"]})
    config.teacher.update({"momentum": said["momentum"], "temp": said["teacher_temp"]})
    config.teacher.update(
        {"warmup_temp": said["warmup_teacher_temp"], "warmup_temp_epochs": said["warmup_teacher_temp_epochs"]}
    )
    return config


def network_params(state: dict[str, np.ndarray], norm_last_layer: bool):
    """Torch names and arrays of backbone and head -> parameters; a fixed gain is none."""
    fixed = "head.last_layer.weight_g"
    if norm_last_layer:
        np.testing.assert_array_equal(state[fixed], 1)
        state = {name: value for name, value in state.items() if name != fixed}
    parts = {part: to_variables(section(state, f"{part}."))["params"] for part in ("backbone", "head")}
    return jax.tree.map(jnp.asarray, parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-8)])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_trajectory(load_reference, optimiser, dtype, tolerance):
    data = load_reference(f"trajectory_{optimiser}.npz")
    with jax.enable_x64(dtype == "float64"):
        check_trajectory(data, dtype, tolerance)


def check_trajectory(data: dict[str, np.ndarray], dtype: str, tolerance: float) -> None:
    """Every loss of a short training run, and where student, teacher and centre end."""
    said = json.loads(str(data["config"]))
    recipe = make_recipe(trajectory_config(said, dtype), said["steps_per_epoch"])

    def params(prefix):
        return network_params(section(data, prefix, np.dtype(dtype)), said["norm_last_layer"])

    state = state_from_student(recipe, {"params": params("init/")})
    step = jax.jit(lambda state, crops: train_step(recipe, state, crops))
    for i in range(said["epochs"] * said["steps_per_epoch"]):
        crops = [data[f"crops/{i}/{c}"].transpose(0, 2, 3, 1).astype(dtype) for c in range(said["crops"])]
        state, metrics = step(state, [np.stack(crops[:2], axis=1), np.stack(crops[2:], axis=1)])
        assert metrics["loss"].dtype == dtype
        np.testing.assert_allclose(metrics["loss"], data[f"loss/{i}"], rtol=0, atol=tolerance)
    for found, prefix in ((state.student["params"], "student/"), (state.ema.teacher, "teacher/")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, params(prefix))
    np.testing.assert_allclose(state.center, data["center"].ravel(), rtol=0, atol=tolerance)
