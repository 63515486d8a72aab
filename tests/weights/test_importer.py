"""Weight files in: the reference checkpoint, every naming, and one line that lists whatever does not fit."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dino_jax.errors import UserError
from dino_jax.models import build_backbone, build_head, build_network
from dino_jax.training.start import import_weights
from dino_jax.training.step import from_items, init_state, make_recipe, to_items
from dino_jax.weights import checkpoint, importer
from dino_jax.weights.load import open_weights
from dino_jax.weights.pth import read_pth, write_pth
from tests.models.torch_names import section, to_variables


def same(a, b):
    """Whether two trees hold the same bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def network_variables(state):
    """`to_variables` of a network's state dict, part by part."""
    parts = {part: to_variables(section(state, f"{part}.")) for part in ("backbone", "head")}
    return {
        collection: {part: trees[collection] for part, trees in parts.items() if trees[collection]}
        for collection in ("params", "batch_stats")
    }


@pytest.fixture
def official(reference):
    return read_pth(reference("official_checkpoint.pth"))


@pytest.fixture
def vit(load_reference):
    """The torch state dict of vit.npz, float32, and its tensors."""
    data = load_reference("vit.npz")
    return {k.removeprefix("param/"): v.astype(np.float32) for k, v in data.items() if k.startswith("param/")}, data


def test_official_checkpoint(official, reference):
    weights = importer.read(reference("official_checkpoint.pth"), heads=3)
    model, head = weights.config.model, weights.config.head
    assert (model.embed_dim, model.depth, model.heads or 3, model.patch_size, model.in_chans) == (24, 3, 3, 8, 3)
    assert (head.out_dim, head.hidden_dim, head.bottleneck_dim, head.layers) == (32, 40, 16, 3)
    assert head.norm_last_layer
    assert not head.use_bn
    assert weights.config.crops.global_size == (32, 32)
    assert (weights.config.optim.lr, weights.config.epochs) == (0.002, 3)
    for name, got in (("teacher", weights.teacher), ("student", weights.student)):
        state = {key.removeprefix("module."): value for key, value in official[name].items()}
        del state["head.last_layer.weight_g"]
        assert same(got, network_variables(state))
    np.testing.assert_array_equal(weights.objectives["dino"]["center"], official["dino_loss"]["center"][0])
    network = build_network(weights.config)
    logits = network.apply(weights.teacher, [jnp.ones((1, 2, 32, 32, 3))]).logits
    assert logits.shape == (1, 2, 32)


def test_moments_of_the_optimizer(official, reference):
    weights = importer.read(reference("official_checkpoint.pth"), heads=3)
    student = [key for key in official["student"] if not key.endswith("weight_g")]
    flat = [key for key in student if official["student"][key].ndim == 1]
    order = [key for key in student if key not in flat] + flat
    state = official["optimizer"]["state"]
    for field, tree in (("exp_avg", weights.moments.mu), ("exp_avg_sq", weights.moments.nu)):
        expected = {key.removeprefix("module."): state[i][field].astype(np.float32) for i, key in enumerate(order)}
        assert same(tree, network_variables(expected)["params"])
    assert weights.moments.count["head"]["last_layer"]["v"] == 6
    assert weights.moments.count["backbone"]["norm"]["bias"] == 9


def test_checkpoint_folder_is_a_whole_training_state(official, reference, tmp_path):
    out = import_weights(reference("official_checkpoint.pth"), tmp_path / "run", heads=3)
    weights = importer.read(reference("official_checkpoint.pth"), heads=3)
    again = open_weights(out, everything=True)
    assert same(again[1:4], weights[1:4])  # teacher, student, objectives
    assert again.config == weights.config
    assert same(open_weights(out).teacher, weights.teacher)
    assert json.loads((out / "config.json").read_text())["model"]["patch_size"] == 8

    recipe = make_recipe(weights.config, steps_per_epoch=3)
    wanted = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    state = from_items(checkpoint.restore(out / "checkpoints", 0, to_items(wanted)))
    adam = state.opt_state[1].inner_states
    assert adam["rest"].inner_state[0].count == 9
    assert adam["last_layer"].inner_state[0].count == 6  # frozen for the first epoch
    np.testing.assert_array_equal(
        adam["rest"].inner_state[0].mu["backbone"]["cls_token"], weights.moments.mu["backbone"]["cls_token"]
    )
    with pytest.raises(UserError, match="already"):
        import_weights(reference("official_checkpoint.pth"), out, heads=3)


def test_other_names_are_the_same_weights(official, tmp_path, reference):
    expected = importer.read(reference("official_checkpoint.pth"), heads=3)

    def rewritten(*pairs):
        def rename(key):
            for old, new in pairs:
                key = key.replace(old, new)
            return key

        return {name: {rename(k): v for k, v in official[name].items()} for name in ("teacher", "student")}

    g, v = "last_layer.weight_g", "last_layer.weight_v"
    variants = {
        "first release": rewritten(
            ("module.", ""), ("backbone.", ""), ("head.mlp", "head.projection_head"), ("last_layer", "prototypes")
        ),
        "no head prefix": rewritten(
            ("module.", ""), ("backbone.", ""), ("head.mlp", "projection_head"), ("head.last_layer", "prototypes")
        ),
        "new torch": rewritten(
            (g, "last_layer.parametrizations.weight.original0"), (v, "last_layer.parametrizations.weight.original1")
        ),
        "ddp": rewritten(("backbone", "module.backbone"), ("head", "module.head")),
        "compiled": rewritten(("module.", ""), ("backbone", "_orig_mod.backbone"), ("head", "_orig_mod.head")),
    }
    for name, content in variants.items():
        write_pth(tmp_path / "variant.pth", content)
        weights = importer.read(tmp_path / "variant.pth", heads=3)
        assert same((weights.teacher, weights.student), (expected.teacher, expected.student)), name


def test_trained_gain_is_a_parameter(official, tmp_path):
    content = {key: dict(official[key]) for key in ("teacher", "student")}
    gain = np.linspace(0.5, 2, 32, dtype=np.float32)[:, None]
    content["student"]["module.head.last_layer.weight_g"] = gain
    write_pth(tmp_path / "free.pth", content)
    weights = importer.read(tmp_path / "free.pth", heads=3)
    assert not weights.config.head.norm_last_layer
    np.testing.assert_array_equal(weights.student["params"]["head"]["last_layer"]["g"], gain)
    np.testing.assert_array_equal(weights.teacher["params"]["head"]["last_layer"]["g"], np.ones_like(gain))


def test_last_layer_without_weight_norm_is_the_same_function(official, tmp_path):
    teacher = dict(official["teacher"])
    del teacher["head.last_layer.weight_g"]
    plain = teacher.pop("head.last_layer.weight_v")
    write_pth(tmp_path / "plain.pth", {"teacher": {**teacher, "head.last_layer.weight": plain}})
    last = importer.read(tmp_path / "plain.pth", heads=3).teacher["params"]["head"]["last_layer"]
    effective = last["g"] * last["v"] / np.linalg.norm(last["v"], axis=1, keepdims=True)
    np.testing.assert_allclose(effective, plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "free", "bn"])
def test_heads_of_every_kind(official, load_reference, tmp_path, kind):
    data = load_reference("head.npz")
    head = {k.removeprefix(f"{kind}/"): v for k, v in data.items() if k.startswith(f"{kind}/")}
    parameters = {k.removeprefix("param/"): v.astype(np.float32) for k, v in head.items() if k.startswith("param/")}
    teacher = {key: value for key, value in official["teacher"].items() if key.startswith("backbone.")}
    teacher |= {f"head.{key}": value for key, value in parameters.items()}
    write_pth(tmp_path / "head.pth", {"teacher": teacher})
    weights = importer.read(tmp_path / "head.pth", heads=3)
    assert weights.config.head.use_bn == (kind == "bn")
    assert not weights.config.head.norm_last_layer  # the gain is not 1, so it has to be a parameter
    variables = {name: tree["head"] for name, tree in weights.teacher.items() if tree}
    logits = build_head(weights.config).apply(variables, jnp.asarray(head["in"], jnp.float32))
    np.testing.assert_allclose(logits, head["out_eval" if kind == "bn" else "out"], atol=1e-5)


def test_backbone_alone_gives_the_reference_features(vit, tmp_path):
    state, data = vit
    size = next(key for key in data if key.startswith("cls/")).removeprefix("cls/")
    heads = data[f"attn/{size}"].shape[1]
    write_pth(tmp_path / "backbone.pth", state)
    safetensors.numpy.save_file(state, tmp_path / "backbone.safetensors")
    for name in ("backbone.pth", "backbone.safetensors"):
        weights = open_weights(tmp_path / name, heads=heads)
        assert weights.student is None
        assert set(weights.teacher["params"]) == {"backbone"}
        model = build_backbone(weights.config.model, weights.config.crops.global_size)
        images = jnp.asarray(data[f"in/{size}"].transpose(0, 2, 3, 1), jnp.float32)
        features = model.apply({"params": weights.teacher["params"]["backbone"]}, images)
        np.testing.assert_allclose(features, data[f"cls/{size}"], atol=1e-5)


def test_backbone_alone_as_a_folder(vit, tmp_path):
    state, _ = vit
    write_pth(tmp_path / "backbone.pth", state)
    out = import_weights(tmp_path / "backbone.pth", tmp_path / "out", heads=3)
    assert same(open_weights(out).teacher, importer.read(tmp_path / "backbone.pth", heads=3).teacher)
    assert open_weights(out, everything=True).student is None


def test_transformers_names(vit, tmp_path):
    state, _ = vit
    new, old = {}, {}
    for key, value in state.items():

        def put(new_key, old_key, part):
            new[new_key], old[old_key] = part, part

        block = ".".join(key.split(".")[1:2])
        if ".attn.qkv." in key:
            for letter, word, part in zip("qkv", ("query", "key", "value"), np.split(value, 3), strict=True):
                leaf = key.rpartition(".")[2]
                put(
                    f"layers.{block}.attention.{letter}_proj.{leaf}",
                    f"encoder.layer.{block}.attention.attention.{word}.{leaf}",
                    part,
                )
            continue
        table = {
            "cls_token": ("embeddings.cls_token",) * 2,
            "pos_embed": ("embeddings.position_embeddings",) * 2,
            "patch_embed.proj": ("embeddings.patch_embeddings.projection",) * 2,
            f"blocks.{block}.norm1": (f"layers.{block}.layernorm_before", f"encoder.layer.{block}.layernorm_before"),
            f"blocks.{block}.norm2": (f"layers.{block}.layernorm_after", f"encoder.layer.{block}.layernorm_after"),
            f"blocks.{block}.attn.proj": (
                f"layers.{block}.attention.o_proj",
                f"encoder.layer.{block}.attention.output.dense",
            ),
            f"blocks.{block}.mlp.fc1": (f"layers.{block}.mlp.fc1", f"encoder.layer.{block}.intermediate.dense"),
            f"blocks.{block}.mlp.fc2": (f"layers.{block}.mlp.fc2", f"encoder.layer.{block}.output.dense"),
            "norm": ("layernorm",) * 2,
        }
        start = max((name for name in table if key.startswith(name)), key=len)
        put(*(key.replace(start, name, 1) for name in table[start]), value)
    write_pth(tmp_path / "official.pth", state)
    expected = importer.read(tmp_path / "official.pth", heads=3).teacher
    wrapped = {f"vit.{key}": value for key, value in old.items()} | {"classifier.weight": np.ones((2, 24), np.float32)}
    for name, tensors in (("old", old), ("new", new), ("classifier", wrapped)):
        folder = tmp_path / name
        folder.mkdir()
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3, "image_size": 32}))
        assert same(open_weights(folder).teacher, expected), name  # heads from config.json


def test_misfits_are_listed(official, tmp_path):
    content = {key: dict(official[key]) for key in ("teacher", "student")}

    def error(change, part="teacher", **options):
        broken = {key: dict(value) for key, value in content.items()}
        change(broken[part])
        write_pth(tmp_path / "broken.pth", broken)
        with pytest.raises(UserError) as caught:
            importer.read(tmp_path / "broken.pth", **{"heads": 3, **options})
        assert "\n" not in str(caught.value)
        assert "broken.pth" in str(caught.value)
        return str(caught.value)

    def everything_wrong(state):
        del state["backbone.blocks.1.mlp.fc1.bias"]
        state["backbone.blocks.0.surprise"] = np.ones(24, np.float32)
        state["backbone.norm.weight"] = np.ones(25, np.float32)

    message = error(everything_wrong)
    assert "missing: backbone.blocks.1.mlp.fc1.bias" in message
    assert "unexpected: backbone.blocks.0.surprise" in message
    assert "backbone.norm.weight is [25], not [24]" in message
    nan = np.full(24, np.nan, np.float32)
    assert "backbone.norm.bias" in error(lambda s: s.update({"backbone.norm.bias": nan}))
    assert "module.backbone" not in error(lambda s: s.pop("module.backbone.norm.bias"), "student")
    assert "cannot identify the model" in error(lambda s: s.pop("backbone.pos_embed"))
    assert "head" in error(lambda s: s.pop("head.last_layer.weight_v"))
    assert "--heads=N" in error(lambda s: None, heads=None)
    assert "not divisible" in error(lambda s: None, heads=5)
    assert "not square" in error(lambda s: s.update({"backbone.pos_embed": np.ones((1, 8, 24), np.float32)}))


def test_no_weights_at_all(tmp_path):
    for content, words in (
        ({"epoch": 3}, "no weights"),
        ({"a": np.ones(3, np.float32)}, "not the weights of"),
        ({"teacher": 3}, "not a dict of tensors"),
        ([1, 2], "no weights"),
        (None, "no weights"),
    ):
        write_pth(tmp_path / "file.pth", content)
        with pytest.raises(UserError, match=words):
            importer.read(tmp_path / "file.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match="safetensors"):
        importer.read(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="names are"):
        importer.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="in this folder"):
        importer.read(tmp_path)


def test_center_is_checked(official, tmp_path):
    content = {key: dict(official[key]) for key in ("teacher", "student")}
    write_pth(tmp_path / "c.pth", {**content, "dino_loss": {"center": np.ones((1, 3), np.float32)}})
    with pytest.raises(UserError, match=r"dino_loss\.center must have 32 finite values for config\.head; it has 3"):
        importer.read(tmp_path / "c.pth", heads=3)


def test_optimizer_that_does_not_map_is_left_out(official, tmp_path, caplog):
    content = {key: dict(official[key]) for key in ("teacher", "student")}
    for optimizer in ({"state": {}, "param_groups": [{"params": [0]}]}, {"state": 1}, {"param_groups": []}):
        write_pth(tmp_path / "o.pth", {**content, "optimizer": optimizer})
        assert importer.read(tmp_path / "o.pth", heads=3).moments is None
        assert "optimizer" in caplog.text
