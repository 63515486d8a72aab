"""Weight files as people have them: wrappers, averaged copies, shards, precisions, other methods' files."""

from __future__ import annotations

import collections
import datetime
import enum
import json
import logging
import pathlib
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dino_jax.errors import UserError
from dino_jax.training.start import import_weights, write_checkpoint
from dino_jax.weights import foreign, importer, networks
from dino_jax.weights.containers import read_weights
from dino_jax.weights.exporter import export_weights
from dino_jax.weights.load import open_weights
from dino_jax.weights.pth import write_pth


def vit(value: float = 0.0, width: int = 192, depth: int = 2, patches: int = 4) -> dict[str, np.ndarray]:
    """A small ViT's state dict whose CLS token tells which copy it is."""

    def array(*shape):
        return np.full(shape, 0.5, np.float32)

    state = {"cls_token": np.full((1, 1, width), value, np.float32), "pos_embed": array(1, patches + 1, width)}
    state |= {"patch_embed.proj.weight": array(width, 3, 8, 8), "patch_embed.proj.bias": array(width)}
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    shapes |= {"mlp.fc2": (width, 4 * width), "norm1": (width,), "norm2": (width,)}
    for block in range(depth):
        for name, shape in shapes.items():
            state |= {f"blocks.{block}.{name}.weight": array(*shape), f"blocks.{block}.{name}.bias": array(shape[0])}
    return state | {"norm.weight": array(width), "norm.bias": array(width)}


def under(prefix: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in state.items()}


def which(content, **options) -> float:
    """The value in the CLS token of the network that is found."""
    network = networks.find(content, options.get("key"), options.get("prefix"), "file.pth")
    tensors = network.tensors(alone=options.get("prefix") is not None)
    assert {"backbone.cls_token", "backbone.norm.bias"} <= tensors.keys()
    return float(tensors["backbone.cls_token"].flat[0])


NAMES = [
    "module.",
    "_orig_mod.",
    "module.module.",
    "module._orig_mod.",
    "_orig_mod.module.backbone.",
    "backbone._orig_mod.module.",
    "_fsdp_wrapped_module.",
    "model._fsdp_wrapped_module._checkpoint_wrapped_module.",
    "_forward_module.encoder.",
    "vit.",
    "model.net.student.",
    "base_model.model.trunk.",
]


@pytest.mark.parametrize("prefix", NAMES)
def test_prefixes_of_any_kind(prefix, caplog):
    caplog.set_level(logging.WARNING)
    for content in (under(prefix, vit(3)), {"state_dict": under(prefix, vit(3)), "epoch": 1}):
        assert which(content) == 3
    assert not caplog.text


def test_wrappers_inside_the_names():
    inside = {key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): x for key, x in vit(3).items()}
    inside = {key.replace("attn.", "attn._fsdp_wrapped_module."): x for key, x in inside.items()}
    assert networks.find(inside, None, None, "f").tensors().keys() == under("backbone.", vit()).keys()
    with pytest.raises(UserError, match="cls_token is there twice"):
        which(vit(1) | under("module.", vit(2)))


CHOICES = {
    "model_ema": {"model": vit(1), "model_ema": vit(2)},
    "state_dict_ema": {"state_dict": vit(1), "state_dict_ema": vit(2)},
    "ema_state_dict": {"ema_state_dict": under("module.", vit(2)), "state_dict": under("module.", vit(1))},
    "teacher": {"model_ema": vit(1), "teacher": under("module.backbone.", vit(2)), "model": vit(0)},
    "teacher_backbone.": {"state_dict": under("student_backbone.", vit(1)) | under("teacher_backbone.", vit(2))},
    "momentum_backbone.": {"state_dict": under("backbone.", vit(1)) | under("momentum_backbone.", vit(2))},
    "target_encoder": {"encoder": vit(1), "target_encoder": vit(2)},
    "ema.model": {"ema": {"model": vit(2), "decay": 0.99}, "model": vit(1)},
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_averaged_copy_is_taken_and_said(name, caplog):
    assert which(CHOICES[name]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    took, _, others = line.partition("also there")
    assert name in took
    assert others.count("--key") + others.count("--prefix") >= 1


def test_key_and_prefix_choose(caplog):
    both = {
        "state_dict": under("student_backbone.vit.", vit(1)) | under("teacher_backbone.vit.", vit(2)),
        "a.b": vit(5),
    }
    assert which(both, prefix="student_backbone.vit.") == 1
    assert which(both, prefix="student_backbone") == 1
    assert which(both, key="a.b") == 5
    assert which({"x": both}, key="x.a.b") == 5
    assert which(both, prefix="") == 5
    for options, words in (
        ({"key": "other"}, "no 'other' in it; it has --key=state_dict --prefix=student_backbone.vit."),
        ({"prefix": "other."}, "no backbone under --prefix=other."),
        ({"prefix": "student"}, "no backbone under --prefix=student"),
    ):
        with pytest.raises(UserError, match=words):
            which(both, **options)


def test_no_choice_between_equals():
    with pytest.raises(UserError, match=r"several networks; choose with `import`: --key=model or --key=state_dict"):
        which({"model": vit(1), "state_dict": vit(2)})
    with pytest.raises(UserError, match=r"several networks \(MoCo weights\); choose .*encoder_k.* or .*encoder_q"):
        which({"state_dict": under("module.encoder_q.", vit(1)) | under("module.encoder_k.", vit(2))})


def test_moments_with_names_are_no_network():
    assert which({"model": vit(1), "optimizer": {"exp_avg": vit(9)}}) == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64])
def test_precisions(tmp_path, dtype):
    state = {key: value.astype(dtype) for key, value in vit(1).items()}
    names = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float64": "F64"}
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for key, value in state.items():
        offsets = [place, place := place + value.nbytes]
        header[key] = {"dtype": names[np.dtype(dtype).name], "shape": value.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in state.values())
    (tmp_path / "a.safetensors").write_bytes(data)
    read = read_weights(tmp_path / "a.safetensors")
    assert all(read[key].dtype == dtype and np.array_equal(read[key], state[key]) for key in state)
    (tmp_path / "a.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"truncated: .*; download it again"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    state, stem = vit(4), "model" if kind == "safetensors" else "pytorch_model"
    write = safetensors.numpy.save_file if kind == "safetensors" else lambda tensors, path: write_pth(path, tensors)
    names = sorted(state)
    parts = {f"{stem}-0000{i}-of-00002.{kind}": names[i - 1 :: 2] for i in (1, 2)}
    for file, keys in parts.items():
        write({key: state[key] for key in keys}, tmp_path / file)
    index = tmp_path / f"{stem}.{kind}.index.json"
    listed = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    index.write_text(json.dumps(listed))
    weights = open_weights(tmp_path)
    assert weights.config.crops.global_size == (16, 16)
    assert weights.teacher["params"]["backbone"]["cls_token"].flat[0] == 4
    assert read_weights(index).keys() == state.keys()

    def refused(words):
        with pytest.raises(UserError, match=words):
            open_weights(tmp_path)

    for broken, words in (
        ("[1]", "holds list"),
        ("{", "not JSON"),
        ('{"weight_map": {"a": 1}}', "no `weight_map`"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file of this folder"),
        (json.dumps({"weight_map": listed["weight_map"] | {"more": next(iter(parts))}}), "they differ in more"),
    ):
        index.write_text(broken)
        refused(words)
    index.write_bytes(b"\xff\xfe")
    refused("not UTF-8")
    index.write_text(json.dumps(listed))
    (tmp_path / next(iter(parts))).unlink()
    refused("is missing")


def test_a_single_bin_and_what_stands_beside_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_pth(tmp_path / "pytorch_model.bin", vit(1))
    assert open_weights(tmp_path).teacher["params"]["backbone"]["cls_token"].flat[0] == 1
    safetensors.numpy.save_file(vit(2), tmp_path / "model.safetensors")
    assert open_weights(tmp_path).teacher["params"]["backbone"]["cls_token"].flat[0] == 2
    assert "not pytorch_model.bin beside it" in caplog.text


FOREIGN = {
    "DINOv2 weights": {"ls": "blocks.0.ls1.gamma"},
    "DINOv2 weights with registers": {"ls": "blocks.0.ls1.gamma", "r": "register_tokens"},
    "DINOv3": {"r": "storage_tokens"},
    "MAE": {"d": "decoder_embed.weight"},
    "distilled DeiT": {"d": "dist_token"},
    "BEiT": {"t": "blocks.0.attn.relative_position_bias_table", "g": "blocks.0.gamma_1"},
    "iBOT": {"m": "masked_embed"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_methods_are_named(tmp_path, name):
    extra = {key: np.ones((1, 1, 192), np.float32) for key in FOREIGN[name].values()}
    write_pth(tmp_path / "f.pth", {"model": vit() | extra})
    with pytest.raises(UserError, match=f"these look like .*{name}"):
        importer.read(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("CLIP", ["visual.conv1.weight", "logit_scale"]),
        ("Swin", ["layers.0.blocks.0.attn.relative_position_bias_table"]),
        ("ConvNeXt", ["stages.0.0.dwconv.weight"]),
        ("linear classifier", ["weight", "bias"]),
        ("FSDP", ["_flat_param"]),
        ("DINOv3 weights .transformers", ["layer.0.layer_scale1.lambda1", "embeddings.cls_token"]),
        ("DINOv2 weights$", ["encoder.layer.0.layer_scale1.lambda1", "embeddings.cls_token"]),
        ("DINOv2 weights in chunks", ["backbone.blocks.0.1.attn.qkv.weight"]),
        ("torchvision's ViT", ["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]),
    ],
)
def test_names_of_others(name, keys, tmp_path):
    assert foreign.name_of(keys)
    write_pth(tmp_path / "f.pth", {key: np.ones(3, np.float32) for key in keys})
    with pytest.raises(UserError, match=name.removesuffix("$")):
        importer.read(tmp_path / "f.pth")


def test_a_table_that_is_not_square(tmp_path):
    """Through timm's layout: safetensors remembers the grid, .pth needs --grid, even where the count is a square."""
    for rows, columns in ((1, 3), (1, 4)):
        folder = tmp_path / f"{rows}{columns}"
        write_pth(folder / "official.pth", vit(1, patches=rows * columns))
        weights = importer.read(folder / "official.pth", grid=(rows, columns))
        assert weights.config.crops.global_size == (8 * rows, 8 * columns)
        run = write_checkpoint(weights, folder / "run")
        export_weights(run, folder / "timm.safetensors", format="timm")
        assert open_weights(folder / "timm.safetensors").config.crops.global_size == (8 * rows, 8 * columns)
        export_weights(run, folder / "timm.pth", format="timm")
        out = import_weights(folder / "timm.pth", folder / "again", grid=(rows, columns))
        again = open_weights(out)
        assert again.config.crops.global_size == (8 * rows, 8 * columns)
        assert jax.tree.all(jax.tree.map(np.array_equal, again.teacher, weights.teacher))
    with pytest.raises(UserError, match=r"3 patches is not square.*give --grid=ROWS,COLUMNS"):
        importer.read(tmp_path / "13" / "timm.pth")
    with pytest.raises(UserError, match="3 patches is not 2 x 2"):
        importer.read(tmp_path / "13" / "timm.pth", grid=(2, 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[]", "holds list"),
        (b'{"num_attention_heads": "3"}', "attention heads"),
        (b'{"num_attention_heads": 3, "image_size": {"h": 1}}', "image size"),
        (b'{"num_attention_heads": true}', "attention heads"),
    ],
)
def test_a_config_beside_the_weights_is_believed_or_refused(tmp_path, content, words):
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    state = {names.get(key, key): value for key, value in vit().items()}
    state["encoder.layer.0.attention.attention.query.weight"] = np.ones((192, 192), np.float32)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json.*{words}"):
        open_weights(tmp_path)


class Mode(enum.Enum):
    """For `test_objects_beside_the_weights`: pickle finds it by name."""

    A = 1


@pytest.mark.extra
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_weights(tmp_path, protocol):
    """Whatever torch.save wrote beside them, in both of its formats."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    weights = {key: torch.from_numpy(value) for key, value in vit(3).items()}
    others = {
        "plain": [Mode.A, pathlib.Path("/a"), datetime.datetime(2020, 1, 1), types.SimpleNamespace(a=1), 1 + 2j, ...],
        "numpy": [np.random.default_rng(0), np.array(["a"]), np.array([None], object), np.float32(3), np.bool_(True)],
        "sets": {(1, 2): frozenset([(3, 4)]), "big": 10**50, "counter": collections.Counter("ab")},
        "torch": [torch.float16, torch.device("cpu"), torch.Size([1]), torch.get_rng_state(), torch.nn.Linear],
        "tensors": [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.empty(3, device="meta")],
        "objects": [optimizer, optimizer.state_dict(), torch.optim.lr_scheduler.StepLR(optimizer, 1), module],
    }
    for old in (False, True):
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not old}
        torch.save({"model": weights, **others}, tmp_path / "a.pth", **options)
        read = importer.read(tmp_path / "a.pth").teacher["params"]["backbone"]
        assert read["cls_token"].flat[0] == 3
        for whole in (module, {"epoch": 1, "model": module}):
            torch.save(whole, tmp_path / "whole.pth", **options)
            with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
                importer.read(tmp_path / "whole.pth")
    for kind in (torch.float8_e4m3fn, torch.bfloat16, torch.float64):
        torch.save({key: torch.nn.Parameter(value.to(kind)) for key, value in weights.items()}, tmp_path / "a.pth")
        assert importer.read(tmp_path / "a.pth").teacher["params"]["backbone"]["cls_token"].flat[0] == 3
