"""The official implementation's numbers, file by file, in `tests/reference` or `$DINO_REFERENCE`.

All sizes are read from the files, so other tensors in the same format can be checked too.
"""

from __future__ import annotations

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.eval import propagation, ranking
from dino_jax.eval.protocols import knn, voc
from dino_jax.models import resize_pos_embed
from dino_jax.objectives.centering import centered, moved
from dino_jax.objectives.dino import dino_loss
from dino_jax.objectives.koleo import koleo
from dino_jax.training.schedules import cosine
from dino_jax.training.step import make_recipe, state_from_student, train_step
from dino_jax.weights import importer
from tests import reference_files
from tests.models.torch_names import crops_of, head_of, section, sequence, to_variables, vit_of

TRAJECTORIES = ("trajectory_adamw.npz", "trajectory_sgd.npz", "trajectory_lars.npz")


@pytest.fixture
def reference():
    """`reference(name)`: the path of a reference file in `$DINO_REFERENCE` if that is set."""
    return reference_files.chosen


def test_koleo(load_reference, x64):
    data = load_reference("family/koleo.npz")
    for case in {key.partition("/")[0] for key in data}:
        loss, grad = jax.value_and_grad(koleo)(data[f"{case}/in"])
        np.testing.assert_allclose(loss, data[f"{case}/loss"], rtol=1e-8, err_msg=case)
        largest = np.abs(data[f"{case}/grad"]).max()  # gradients reach 1e7
        np.testing.assert_allclose(grad, data[f"{case}/grad"], rtol=0, atol=1e-6 * largest, err_msg=case)


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
    """Loss, gradient and center over consecutive steps; the file keeps logits crop-major."""
    temps = data["teacher_temp_per_epoch"]
    center = jnp.zeros(data["step0/student"].shape[-1], dtype)
    batch = data["step0/teacher"].shape[0] // 2

    def batch_major(logits):
        return logits.reshape(-1, batch, logits.shape[-1]).swapaxes(0, 1).astype(dtype)  # [C*B, K] -> [B, C, K]

    @jax.jit
    def run(student, teacher, center, temp):
        def loss(s):
            return dino_loss(s, centered(teacher, center, temp))[0]

        return *jax.value_and_grad(loss)(student), moved(center, teacher.mean((0, 1)), 0.9)

    for step, temp in enumerate(temps):
        student, teacher = (batch_major(data[f"step{step}/{who}"]) for who in ("student", "teacher"))
        loss, grad, center = run(student, teacher, center, temp)
        expected = data[f"step{step}/loss"]
        np.testing.assert_allclose(loss, expected, rtol=0, atol=tolerance * max(1, abs(expected)))
        np.testing.assert_allclose(grad, batch_major(data[f"step{step}/grad_student"]), rtol=0, atol=tolerance)
        np.testing.assert_allclose(center, data[f"step{step}/center_after"][0], rtol=0, atol=tolerance)


def trajectory_config(said: dict, dtype: str):
    """The configuration of a trajectory, from the JSON in its file."""
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
    config.optim.lr = said["lr"] * 256 / said["batch"]  # the file has the scaled learning rate
    config.optim.update({"warmup_epochs": said["warmup_epochs"], "freeze_last_layer": said["freeze_last_layer_epochs"]})
    config.teacher.update({"momentum": said["momentum"], "temp": said["teacher_temp"]})
    config.teacher.update(
        {"warmup_temp": said["warmup_teacher_temp"], "warmup_temp_epochs": said["warmup_teacher_temp_epochs"]}
    )
    return config


def network_params(state: dict[str, np.ndarray], norm_last_layer: bool):
    """Torch names and arrays of backbone and head -> parameters; a fixed gain is not a parameter."""
    fixed = "head.last_layer.weight_g"
    if norm_last_layer:
        np.testing.assert_array_equal(state[fixed], 1)
        state = {name: value for name, value in state.items() if name != fixed}
    parts = {part: to_variables(section(state, f"{part}."))["params"] for part in ("backbone", "head")}
    return jax.tree.map(jnp.asarray, parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-8)])
@pytest.mark.parametrize("file", TRAJECTORIES)
def test_trajectory(load_reference, file, dtype, tolerance):
    data = load_reference(file)
    with jax.enable_x64(dtype == "float64"):
        check_trajectory(data, dtype, tolerance)


def check_trajectory(data: dict[str, np.ndarray], dtype: str, tolerance: float) -> None:
    """Every loss of a short training run, then student, teacher and center at its end."""
    said = json.loads(str(data["config"]))
    recipe = make_recipe(trajectory_config(said, dtype), said["steps_per_epoch"])

    def params(prefix):
        return network_params(section(data, prefix, np.dtype(dtype)), said["norm_last_layer"])

    state = state_from_student(recipe, {"params": params("init/")})
    step = jax.jit(lambda state, crops: train_step(recipe, state, crops))
    for i in range(said["epochs"] * said["steps_per_epoch"]):
        state, metrics = step(state, crops_of(data, i, said["crops"], dtype))
        assert metrics["loss"].dtype == dtype
        np.testing.assert_allclose(metrics["loss"], data[f"loss/{i}"], rtol=0, atol=tolerance)
    for found, prefix in ((state.student["params"], "student/"), (state.ema.teacher, "teacher/")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, params(prefix))
    np.testing.assert_allclose(state.objectives["dino"]["center"], data["center"].ravel(), rtol=0, atol=tolerance)


def test_official_checkpoint(reference, load_reference):
    """The end of the AdamW trajectory as a checkpoint of the official code."""
    data = load_reference("trajectory_adamw.npz")
    said = json.loads(str(data["config"]))
    weights = importer.read(reference("official_checkpoint.pth"), heads=said["heads"])
    for name, found in (("student", weights.student), ("teacher", weights.teacher)):
        state = section(data, f"{name}/", np.float32)
        jax.tree.map(np.testing.assert_array_equal, found["params"], network_params(state, said["norm_last_layer"]))
    np.testing.assert_array_equal(weights.objectives["dino"]["center"], data["center"].ravel().astype(np.float32))


def check_vit(data: dict[str, np.ndarray], dtype, tolerance: float) -> None:
    state = section(data, "param/", dtype)
    sizes = [key.removeprefix("in/") for key in data if key.startswith("in/")]
    model = vit_of(state, data[f"attn/{sizes[0]}"].shape[1], dtype)
    variables = {"params": to_variables(state)["params"]}

    @jax.jit
    def run(images):
        return (
            model.apply(variables, images),
            model.apply(variables, images, model.depth, method="tokens"),
            model.apply(variables, images, method="attention"),
        )

    for size in sizes:
        images = data[f"in/{size}"].transpose(0, 2, 3, 1).astype(dtype)
        cls, tokens, attention = run(images)
        tokens = sequence(tokens)
        assert cls.dtype == tokens.dtype == attention.dtype == dtype
        np.testing.assert_allclose(cls, data[f"cls/{size}"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(attention, data[f"attn/{size}"], rtol=0, atol=tolerance)
        for layer in range(model.depth):
            np.testing.assert_allclose(tokens[layer], data[f"layer{layer}/{size}"], rtol=0, atol=tolerance)


def test_vit_float32(load_reference):
    check_vit(load_reference("vit.npz"), np.float32, 1e-5)


def exactness(data: dict[str, np.ndarray]) -> float:
    """The tolerance in float64: wider if the file keeps the weights rounded to float32."""
    return 1e-8 if data["param/cls_token"].dtype == np.float64 else 1e-6


def test_vit_float64(load_reference, x64):
    data = load_reference("vit.npz")
    check_vit(data, np.float64, exactness(data))


def check_pos_embed(data: dict[str, np.ndarray], dtype, tolerance: float) -> None:
    for name, expected in section(data, "grid/").items():
        grid = tuple(int(n) for n in name.split("x"))
        resized = resize_pos_embed(jnp.asarray(data["pos_embed"], dtype), grid)
        np.testing.assert_allclose(resized, expected, rtol=0, atol=tolerance, err_msg=name)


def test_position_resize_float32(load_reference):
    check_pos_embed(load_reference("pos_embed.npz"), np.float32, 1e-5)


def test_position_resize_float64(load_reference, x64):
    check_pos_embed(load_reference("pos_embed.npz"), np.float64, 1e-8)


def check_linear_features(vit: dict, data: dict, dtype, tolerance: float) -> None:
    state = section(vit, "param/", dtype)
    heads = next(value.shape[1] for key, value in vit.items() if key.startswith("attn/"))
    model, variables = vit_of(state, heads, dtype), {"params": to_variables(state)["params"]}
    images = jnp.asarray(data["in"].transpose(0, 2, 3, 1), dtype)
    last_two = model.apply(variables, images, 2, method="tokens")  # [2, B, ...]
    n2 = jnp.concatenate([last_two.cls[0], last_two.cls[1]], axis=-1)
    pair = jnp.stack([last_two.cls[-1], last_two.flat_patches[-1].mean(axis=1)], axis=-1)  # [B, D, 2]: interleaved
    np.testing.assert_allclose(n2, data["n2"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(pair.reshape(len(images), -1), data["n1_avgpool"], rtol=0, atol=tolerance)


def test_linear_features_float32(load_reference):
    check_linear_features(load_reference("vit.npz"), load_reference("linear_features.npz"), np.float32, 1e-5)


def test_linear_features_float64(load_reference, x64):
    data = load_reference("vit.npz")
    check_linear_features(data, load_reference("linear_features.npz"), np.float64, exactness(data))


def check_head(data: dict[str, np.ndarray], kind: str, dtype, tolerance: float) -> None:
    state = section(data, f"{kind}/param/", dtype)
    model, variables = head_of(state, dtype), to_variables(state)
    if model.norm_last_layer:
        del variables["params"]["last_layer"]["g"]
    features = data[f"{kind}/in"].astype(dtype)
    expected = to_variables(section(data, f"{kind}/after/", dtype))["batch_stats"]
    # `param` in the file holds the statistics after the training pass, which began with torch's initial ones.
    variables["batch_stats"] = {
        name: {"mean": 0 * old["mean"], "var": 0 * old["var"] + 1} for name, old in expected.items()
    }
    train, evaluate = (jax.jit(partial(model.apply, train=train, mutable=["batch_stats"])) for train in (True, False))
    out, moved = train(variables, features)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, data[f"{kind}/out"], rtol=0, atol=tolerance)
    if expected:
        close = partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
        jax.tree.map(close, moved["batch_stats"], expected)
        evaluated, _ = evaluate(variables | moved, features)
        np.testing.assert_allclose(evaluated, data[f"{kind}/out_eval"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["plain", "free", "bn"])
def test_head_float32(load_reference, kind):
    check_head(load_reference("head.npz"), kind, np.float32, 1e-5)


@pytest.mark.parametrize("kind", ["plain", "free", "bn"])
def test_head_float64(load_reference, x64, kind):
    check_head(load_reference("head.npz"), kind, np.float64, 1e-8)


def test_attention_threshold(load_reference):
    data = load_reference("attention_threshold.npz")
    masks = section(data, "mask_")
    assert masks
    for mass, expected in masks.items():
        np.testing.assert_array_equal(voc.attention_masks(data["attention"], float(mass)), expected, err_msg=mass)


def test_label_propagation(load_reference):
    data = load_reference("label_propagation.npz")
    h, w = data["grid"]
    fold = lambda x: x.reshape(*x.shape[:-2], h, w, x.shape[-1])  # noqa: E731
    labels = np.moveaxis(data["context_segmentations"], 1, -1)
    got = propagation.propagate(
        fold(data["context_features"]).astype(np.float32),
        fold(data["target_features"]).astype(np.float32),
        labels.astype(np.float32),
        radius=int(data["radius"]),
        topk=int(data["topk"]),
        temperature=float(data["temperature"]),
    )
    np.testing.assert_allclose(np.moveaxis(got, -1, 0), data["propagated"], atol=1e-5)
    (name,) = (key for key in data if key.startswith("upsampled_x"))
    scale = int(re.fullmatch(r"upsampled_x(\d+)_labels", name)[1])
    np.testing.assert_array_equal(propagation.hard_labels(got, scale), data[name])


def test_knn(load_reference):
    data = load_reference("knn.npz")
    wanted = {int(key.rpartition("k")[2]): value for key, value in data.items() if key.startswith("top1_top5/")}
    got = knn.knn_classify(data["train"], data["train_labels"], data["test"], data["test_labels"], ks=tuple(wanted))
    for k, value in wanted.items():
        np.testing.assert_allclose(got[k], value, atol=1e-9)


def truths(data):
    count = data["similarity"].shape[1]
    return [{key: data[f"gnd/{q}/{key}"] for key in ("easy", "hard", "junk")} for q in range(count)]


def test_retrieval(load_reference):
    data = load_reference("retrieval.npz")
    scores = ranking.revisited_scores(data["similarity"], truths(data))
    for name in ("medium", "hard"):
        np.testing.assert_allclose(scores[name]["map"], data[f"{name}/map"], atol=1e-12)
        np.testing.assert_allclose(scores[name]["aps"], data[f"{name}/aps"], atol=1e-12)


def test_whitening(load_reference):
    data = load_reference("copy_detection.npz")
    whiten = ranking.Whitening(data["whitening"])
    for name in ("queries", "database"):
        got, wanted = whiten(data[name]), data[f"{name}_whitened"]
        sign = np.sign(np.sum(got * wanted, axis=0))  # an eigenvector's sign is arbitrary
        np.testing.assert_allclose(got * sign, wanted, atol=1e-8)


def test_gem(load_reference, x64):
    data = load_reference("copy_detection.npz")
    patches = data["patches"].reshape(len(data["patches"]), -1, data["patches"].shape[-1])
    np.testing.assert_allclose(ranking.gem(patches), data["gem"], atol=1e-10)
