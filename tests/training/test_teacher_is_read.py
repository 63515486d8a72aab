"""Evaluation, export, features and the evaluations of a run take the teacher, never the student."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dino_jax import config_io
from dino_jax.cli import main
from dino_jax.eval.protocols import voc
from dino_jax.inference.model import Model, load
from dino_jax.training import online, start
from dino_jax.training.step import init_state, make_recipe, to_items
from dino_jax.weights.checkpoint import Checkpointer
from dino_jax.weights.exporter import export_weights
from dino_jax.weights.pth import read_pth
from tests.eval.test_by_hand import knn_accuracy, noise
from tests.tiny import tiny_config

SCENES = "scenes:val?size=5&image_size=32"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose last checkpoint has random weights, the student's not the teacher's, and its state."""
    config, rng = tiny_config(), np.random.default_rng(0)
    state = jax.eval_shape(lambda: init_state(make_recipe(config, 4), jax.random.key(0)))

    def drawn(path, x):
        scale = getattr(path[-1], "key", "") == "scale"
        return rng.normal(scale, 0.3, x.shape).astype(x.dtype)

    state = jax.tree_util.tree_map_with_path(drawn, state).replace(
        step=np.int32(7), salt=np.int32(0), bad_steps=np.int32(0)
    )
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir / "checkpoints", asynchronous=False) as checkpoints:
        checkpoints.save(7, to_items(state), config_io.to_json(config))
    return workdir, config, state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two labeled sources of other images, as specs, images and labels."""
    rng, folder, parts = np.random.default_rng(1), tmp_path_factory.mktemp("data"), []
    for name, count in (("train", 60), ("test", 48)):
        images, labels = noise(rng, count, 32, 32), rng.integers(4, size=count)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        parts.append((f"arrays:{folder / name}.npz", images, labels))
    return parts


def features(config, params, images):
    model = Model(config, {"params": params["backbone"]})
    return model.features(images).astype(np.float64)


def accuracy(config, params, data, k, temperature):
    (_, train, train_labels), (_, test, test_labels) = data
    problem = features(config, params, train), train_labels, features(config, params, test), test_labels
    return knn_accuracy(*problem, k, temperature)


def test_load_and_features(run, data, tmp_path):
    workdir, config, state = run
    model = load(workdir)
    jax.tree.map(np.testing.assert_array_equal, model.variables["params"], state.ema.teacher["backbone"])
    out = tmp_path / "f.npz"
    main(["features", f"--checkpoint={workdir}", f"--images={data[1][0]}", f"--out={out}"])
    expected = features(config, state.ema.teacher, data[1][1])
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=1e-5)
    assert np.abs(features(config, state.student["params"], data[1][1]) - expected).max() > 0.1


def test_the_verb_eval(run, data, tmp_path):
    workdir, config, state = run
    out = tmp_path / "o.json"
    arguments = [f"--checkpoint={workdir}", f"--data={data[0][0]},{data[1][0]}", f"--out={out}"]
    main(
        [
            "eval",
            "knn",
            *arguments,
            "--config.k=(7,)",
            "--config.temperature=0.3",
            "--config.crop=32",
            "--config.resize=0",
        ]
    )
    top1, top5 = accuracy(config, state.ema.teacher, data, 7, 0.3)
    assert json.loads(out.read_text()) == pytest.approx({"top1_k7": top1, "top5_k7": top5})
    assert accuracy(config, state.student["params"], data, 7, 0.3) != (top1, top5)


@pytest.mark.parametrize("format", ["official", "timm", "hf"])
def test_export(run, tmp_path, format):
    workdir, _, state = run
    path = export_weights(workdir, tmp_path / "out", format=format)
    teacher, student = (p["backbone"]["cls_token"] for p in (state.ema.teacher, state.student["params"]))
    if format == "official":
        content = read_pth(path)
        np.testing.assert_array_equal(content["teacher"]["backbone.cls_token"], teacher)
        np.testing.assert_array_equal(content["student"]["module.backbone.cls_token"], student)
        return
    tensors = safetensors.numpy.load_file(path)
    (found,) = (value for name, value in tensors.items() if "cls_token" in name)
    np.testing.assert_array_equal(found, teacher)


def test_evaluations_of_a_run(run, data):
    """The queries and neighbors are not the same images, and all settings are odd ones."""
    _, config, state = run
    config = config.copy_and_resolve_references()
    config.eval.update({"knn_every": 1, "knn_train": data[0][0], "knn_test": data[1][0], "knn_k": 12})
    config.eval.update({"knn_temperature": 0.3, "resize": 0, "crop": 32, "batch_size": 13})
    config.eval.update({"voc_every": 1, "voc_data": SCENES, "voc_size": 24})
    found = online.Evaluations(config, make_recipe(config, 4), 4).run(4, jax.tree.map(jnp.asarray, state))
    top1, top5 = accuracy(config, state.ema.teacher, data, 12, 0.3)
    assert top1 not in [accuracy(config, state.ema.teacher, data, *other)[0] for other in ((20, 0.3), (12, 0.07))]
    settings = voc.PROTOCOL.default_config()
    settings.size = 24
    model = Model(config, {"params": state.ema.teacher["backbone"]})
    jaccards = {f"voc_{key}": value for key, value in voc.evaluate(model, SCENES, settings).items()}
    assert found == pytest.approx({"knn_top1": top1, "knn_top5": top5, **jaccards})


def test_start_from_a_run(run):
    """Its teacher and its student come along, each where it was."""
    workdir, config, state = run
    config = config.copy_and_resolve_references()
    config.init_from = str(workdir)
    fresh = jax.tree.map(jnp.zeros_like, state)
    begun, _ = start.start_from(fresh, config)
    jax.tree.map(np.testing.assert_array_equal, begun.student["params"], state.student["params"])
    jax.tree.map(np.testing.assert_array_equal, begun.ema.teacher, state.ema.teacher)
    np.testing.assert_array_equal(begun.objectives["dino"]["center"], state.objectives["dino"]["center"])
    assert int(begun.step) == 0
