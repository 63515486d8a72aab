"""Weights out: bit-identical round trips for every format and backbone; programs that compute the same."""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.models import BACKBONES, build_backbone
from dino_jax.training.start import import_weights, write_checkpoint
from dino_jax.weights import architecture, importer, keys
from dino_jax.weights.exporter import backbone_tensors, export_weights, official, part
from dino_jax.weights.importer import Restored
from dino_jax.weights.load import open_weights
from dino_jax.weights.pth import read_pth, write_pth
from tests.weights.test_importer import same

TINY = {"vit": {"embed_dim": 24, "depth": 2, "heads": 3}, "xcit": {"embed_dim": 32, "depth": 2, "heads": 4}}


def random_weights(name: str, head: bool = False, size=(32, 32), registers: int = 0, **head_options) -> Restored:
    """A network of the registry, ViT and XCiT made tiny, with random numbers in every variable."""
    config, rng = default(), np.random.default_rng(0)
    config.model.name, config.model.patch_size = name, 8
    config.model.update({**TINY.get(name.partition("_")[0], {}), "registers": registers})
    config.crops.global_size, config.crops.local_size = size, (16, 16)
    config.head.update({"out_dim": 16, "hidden_dim": 20, "bottleneck_dim": 12, **head_options})

    def number(path, leaf):
        values = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        return np.abs(values) + 0.5 if path[-1].key == "var" else values

    def fill(shapes):
        return jax.tree_util.tree_map_with_path(number, shapes)

    parts = {"backbone": fill(architecture.backbone_shapes(config))}
    if head:
        parts["head"] = fill(architecture.head_shapes(config))
    trees = {
        collection: {name: tree[collection] for name, tree in parts.items() if collection in tree}
        for collection in ("params", "batch_stats")
    }
    if not head:
        return Restored(config, trees)
    return Restored(config, trees, fill(trees), {"dino": {"center": np.asarray(rng.normal(size=16), np.float32)}})


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """A checkpoint folder of a tiny ViT, backbone alone, and its weights."""
    weights = random_weights("vit_tiny")
    return write_checkpoint(weights, tmp_path_factory.mktemp("vit") / "run"), weights


def test_the_official_checkpoint_comes_back_bit_identical(reference, tmp_path):
    before = read_pth(reference("official_checkpoint.pth"))
    import_weights(reference("official_checkpoint.pth"), tmp_path / "run", heads=3)
    after = read_pth(export_weights(tmp_path / "run", tmp_path / "back.pth", format="official"))
    for name in ("student", "teacher"):
        assert before[name].keys() == after[name].keys()
        for key, value in before[name].items():
            assert after[name][key].dtype == value.dtype, key
            assert after[name][key].tobytes() == value.tobytes(), key
    assert after["dino_loss"]["center"].tobytes() == before["dino_loss"]["center"].tobytes()
    assert after["dino_loss"]["center"].shape == before["dino_loss"]["center"].shape
    again = importer.read(tmp_path / "back.pth")  # our own exports say how many heads
    assert same(again.student, importer.read(reference("official_checkpoint.pth"), heads=3).student)


@pytest.mark.parametrize("format", ["official", "timm", "hf"])
@pytest.mark.parametrize("name", ["vit_tiny", "resnet18", "xcit_small_12"])
def test_backbones_come_back_bit_identical(tmp_path, name, format):
    weights = random_weights(name)
    if format == "hf" and name != "vit_tiny":
        with pytest.raises(UserError, match="transformers has no"):
            backbone_tensors(weights, format)
        return
    write_pth(tmp_path / "out.pth", backbone_tensors(weights, format))
    again = open_weights(tmp_path / "out.pth", heads=3 if name == "vit_tiny" else None)
    assert same(again.teacher, weights.teacher)
    if name != "vit_tiny":
        for key in ("name", "depth", "embed_dim", "heads", "in_chans", "small_stem"):
            assert again.config.model[key] == weights.config.model[key]


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny", {"norm_last_layer": False}), ("vit_tiny", {"use_bn": True}), ("resnet18", {"layers": 2})],
)
def test_whole_networks_come_back_bit_identical(tmp_path, name, options):
    weights = random_weights(name, head=True, size=(24, 40), **options)
    write_pth(tmp_path / "full.pth", official(weights))
    again = importer.read(tmp_path / "full.pth")
    assert same(again[1:4], weights[1:4])  # teacher, student, objectives
    assert again.config.crops.global_size == weights.config.crops.global_size
    for key in ("out_dim", "hidden_dim", "bottleneck_dim", "layers", "use_bn", "norm_last_layer"):
        assert again.config.head[key] == weights.config.head[key]
    content = official(weights)
    assert all(key.startswith("module.") for key in content["student"])
    has_batch_norm = name == "resnet18" or "use_bn" in options
    assert all(key.startswith("module.") == has_batch_norm for key in content["teacher"])


def test_registers_come_back(tmp_path):
    """Bit by bit in the official layout; in timm's, which folds a position into CLS, as the same function."""
    weights = random_weights("vit_tiny", head=True, registers=2)
    write_pth(tmp_path / "full.pth", official(weights))
    again = importer.read(tmp_path / "full.pth")
    assert again.config.model.registers == 2
    assert same(again[1:4], weights[1:4])  # teacher, student, objectives
    tensors = backbone_tensors(weights, "timm")
    assert tensors["reg_token"].shape == (1, 2, 24) and tensors["pos_embed"].shape == (1, 16, 24)
    write_pth(tmp_path / "timm.pth", tensors)
    theirs = importer.read(tmp_path / "timm.pth", heads=3)
    assert theirs.config.model.registers == 2
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = build_backbone(weights.config.model, (32, 32))
    one, two = (model.apply(part(w.teacher, "backbone"), images, method="tokens") for w in (weights, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
    with pytest.raises(UserError, match=r"registers \(model\.registers\); choose official or timm"):
        backbone_tensors(weights, "hf")


def test_other_channel_counts_and_small_stem(tmp_path):
    weights = Restored(default(), {})
    weights.config.model.update({"name": "resnet18", "small_stem": True, "in_chans": 1})
    weights.config.data.mean, weights.config.data.std = (0.5,), (0.5,)
    shapes = architecture.backbone_shapes(weights.config)
    weights = weights._replace(
        teacher={
            name: {"backbone": jax.tree.map(lambda s: np.ones(s.shape, np.float32), tree)}
            for name, tree in shapes.items()
        }
    )
    write_pth(tmp_path / "small.pth", backbone_tensors(weights, "timm"))
    again = open_weights(tmp_path / "small.pth")
    assert (again.config.model.small_stem, again.config.model.in_chans) == (True, 1)
    assert len(again.config.data.mean) == 1
    assert same(again.teacher, weights.teacher)


def test_hf_folder_describes_the_model(tiny_vit, tmp_path):
    run, _ = tiny_vit
    export_weights(run, tmp_path / "hf", format="hf")
    description = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert description["layer_norm_eps"] == 1e-6
    assert (description["hidden_size"], description["num_attention_heads"], description["image_size"]) == (24, 3, 32)


def test_the_files_of_a_run_stay(tiny_vit):
    """A run's folder is no place for an export, and a weight file in it does not stand in for the run."""
    run, _ = tiny_vit
    config = (run / "config.json").read_text()
    steps = run / "checkpoints"
    inside = [{"format": "timm", "out": folder} for folder in (run, steps, steps / "0", steps / "0" / "a.pth")]
    for options in (*inside, {"format": "hf", "out": run / "model.safetensors"}):
        with pytest.raises(UserError, match="this is the folder of a run"):
            export_weights(run, **options)
    assert (run / "config.json").read_text() == config and not (run / "model.safetensors").exists()
    other = random_weights("vit_tiny")
    other.teacher["params"]["backbone"]["cls_token"][:] = 7
    export_weights(write_checkpoint(other, run / "other"), run / "model.safetensors", format="timm")
    for folder in (run, steps, steps / "0"):
        stray = folder / "model.safetensors"
        if folder != run:
            stray.write_bytes((run / "model.safetensors").read_bytes())
        assert not np.any(open_weights(folder).teacher["params"]["backbone"]["cls_token"] == 7)
    for folder in (run, steps, steps / "0"):
        (folder / "model.safetensors").unlink()


def test_formats_and_names_of_files(tiny_vit, tmp_path):
    run, _ = tiny_vit
    with pytest.raises(UserError, match="choose one of official, timm, hf, stablehlo, onnx"):
        export_weights(run, tmp_path / "x", format="caffe")
    with pytest.raises(UserError, match=r"writes \.pth"):
        export_weights(run, tmp_path / "x.onnx", format="official")
    assert export_weights(run, tmp_path / "a.pth", format="timm").name == "a.pth"
    assert export_weights(run, tmp_path / "folder", format="timm").name == "model.safetensors"


@pytest.mark.parametrize("attention", [False, True])
def test_stablehlo_program(tiny_vit, tmp_path, attention):
    pytest.importorskip("flatbuffers")
    run, weights = tiny_vit
    path = export_weights(run, tmp_path, format="stablehlo", attention=attention, image_size=(24, 40))
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    model, variables = build_backbone(weights.config.model, (32, 32)), part(weights.teacher, "backbone")
    for batch in (1, 3):
        images = np.random.default_rng(1).normal(size=(batch, 24, 40, 3)).astype(np.float32)
        outputs = program.call(images)
        features = outputs[0] if attention else outputs
        np.testing.assert_allclose(features, model.apply(variables, images), atol=1e-5)
        if attention:
            expected = model.apply(variables, images, method="attention")
            np.testing.assert_allclose(outputs[1], expected, atol=1e-6)


@pytest.mark.extra
@pytest.mark.parametrize("name", ["vit_tiny", "resnet18", "xcit_small_12"])
def test_onnx_program(tmp_path, name):
    for module in ("flatbuffers", "onnx", "jax2onnx"):
        pytest.importorskip(module)
    runtime = pytest.importorskip("onnxruntime")
    weights = random_weights(name)
    write_checkpoint(weights, tmp_path / "run")
    attention = name != "resnet18"
    path = export_weights(tmp_path / "run", tmp_path / "m.onnx", format="onnx", attention=attention)
    session = runtime.InferenceSession(str(path))
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["features", "attention"][: 1 + attention]
    model, variables = build_backbone(weights.config.model, (32, 32)), part(weights.teacher, "backbone")
    for batch in (1, 3):
        images = np.random.default_rng(1).normal(size=(batch, 32, 32, 3)).astype(np.float32)
        outputs = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        expected = np.asarray(model.apply(variables, images))
        np.testing.assert_allclose(outputs[0], expected, atol=1e-4 * np.abs(expected).max())
        if attention:
            np.testing.assert_allclose(outputs[1], model.apply(variables, images, method="attention"), atol=1e-5)


def test_a_missing_converter_is_named(tiny_vit, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run, _ = tiny_vit
    with pytest.raises(UserError, match="pip install"):
        export_weights(run, tmp_path, format="onnx")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("vit_small", "resnet18") else pytest.mark.extra) for name in BACKBONES],
)
def test_registered_models_are_known_from_their_shapes(name):
    config = default()
    config.model.name = name
    table = keys.key_table(architecture.backbone_shapes(config), architecture.rules(config, "official"))
    tensors = {key: np.empty(entry.shape, np.float16) for entry in table for key in entry.keys}
    fmt, found = architecture.recognize(tensors, name), default()
    architecture.fill_model(found, fmt, tensors, architecture.Hints(), name)
    assert found.model == config.model
    assert found.crops.global_size == (224, 224)


def test_arguments_are_plain(tiny_vit):
    _, weights = tiny_vit
    assert "args" not in official(weights)
    args = official(random_weights("vit_tiny", head=True))["args"]
    assert not isinstance(args, argparse.Namespace)
    assert args["num_heads"] == 3
