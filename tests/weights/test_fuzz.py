"""Random damage to every kind of weight file: it still loads, or one line says what is wrong, soon."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from dino_jax.errors import UserError
from dino_jax.weights import importer
from dino_jax.weights.exporter import backbone_tensors
from dino_jax.weights.pth import read_pth, write_pth
from tests.weights.test_networks import vit
from tests.weights.test_pth import archive, old_format

ROUNDS = int(os.environ.get("DINO_FUZZ", 60))  # more by hand


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut out, put in or repeated."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 30])
        kind = rng.randrange(6)
        if kind < 3 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[place : place + size]
        elif kind == 4:
            data[place:place] = rng.randbytes(size)
        else:
            data[place:place] = data[max(0, place - size) : place]
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def outcome(path) -> str:
    """What importing gives; anything but weights and `UserError` fails the test."""
    begin = time.perf_counter()
    try:
        importer.read(path, heads=3)
        message = ""
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert message
    assert time.perf_counter() - begin < 10
    return message


def tensors() -> dict[str, np.ndarray]:
    return vit(depth=1, width=24)


@functools.cache
def transformers_names() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        write_pth(f"{folder}/a.pth", tensors())
        return backbone_tensors(importer.read(f"{folder}/a.pth", heads=3), "hf")


def content() -> dict:
    """An official checkpoint's kinds of values."""
    head = {"mlp.0.weight": np.ones((8, 24), np.float32), "mlp.0.bias": np.ones(8, np.float32)}
    head |= {"mlp.2.weight": np.ones((8, 8), np.float32), "mlp.2.bias": np.ones(8, np.float32)}
    head |= {"mlp.4.weight": np.ones((4, 8), np.float32), "mlp.4.bias": np.ones(4, np.float32)}
    head |= {"last_layer.weight_g": np.ones((16, 1), np.float32), "last_layer.weight_v": np.ones((16, 4), np.float32)}
    teacher = {f"backbone.{key}": x for key, x in tensors().items()} | {f"head.{key}": x for key, x in head.items()}
    student = {f"module.{key}": value for key, value in teacher.items()}
    args = {"lr": 0.1, "epochs": 3, "batch_size_per_gpu": 4, "world_size": 2, "global_crops_scale": [0.4, 1.0]}
    groups = [{"params": [0, 1]}, {"params": [2]}]
    return {
        "teacher": teacher,
        "student": student,
        "args": args,
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": groups},
        "dino_loss": {"center": np.zeros((1, 16), np.float32)},
    }


def write(kind: str, folder, rng: random.Random) -> str:
    """A damaged file of a kind; returns its path."""
    path = folder / ("model.safetensors" if kind in ("safetensors", "folder") else "weights.pth")
    if kind == "zip":
        write_pth(path, content())
        path.write_bytes(damaged(path.read_bytes(), rng))
    elif kind == "pickle":  # inside a whole archive
        write_pth(path, content())
        with zipfile.ZipFile(path) as file:
            members = {name.split("/")[-1]: file.read(name) for name in file.namelist()}
        pickled = damaged(members.pop("data.pkl"), rng)
        archive(path, pickled, {name: data for name, data in members.items() if name.isdigit()})
    elif kind == "old":
        path.write_bytes(damaged(old_format(tensors()), rng))
    elif kind == "safetensors":
        path.write_bytes(damaged(safetensors.numpy.save(tensors()), rng))
    else:
        state = transformers_names()
        half = len(state) // 2
        for part, keys in enumerate((list(state)[:half], list(state)[half:])):
            safetensors.numpy.save_file({key: state[key] for key in keys}, folder / f"{part}.safetensors")
        places = {key: f"{int(i >= half)}.safetensors" for i, key in enumerate(state)}
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3, "image_size": 16}))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        victim = rng.choice(["config.json", "model.safetensors.index.json", "0.safetensors"])
        (folder / victim).write_bytes(damaged((folder / victim).read_bytes(), rng))
        return folder
    return path


@pytest.mark.parametrize("kind", ["zip", "pickle", "old", "safetensors", "folder"])
def test_damage_gives_weights_or_one_line(tmp_path, kind):
    rng = random.Random(kind)
    messages = set()
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        messages.add(outcome(write(kind, tmp_path, rng)))
    assert len(messages) > 3


def test_tensors_of_any_kind(tmp_path):
    """Whole files whose tensors have other shapes, types and names."""
    rng = random.Random(0)
    for _ in range(ROUNDS):
        state = content()
        for part in ("teacher", "student"):
            for key in rng.sample(sorted(state[part]), rng.choice([0, 1, 2])):
                value = state[part].pop(key)
                sizes = [rng.choice([0, 1, 2, 3, 24, 1000]) for _ in range(rng.randrange(5))]
                odd = np.zeros(sizes if np.prod(sizes) < 1e6 else (1,), rng.choice([np.float32, np.int64, np.bool_]))
                new = rng.choice([odd, value.reshape(-1), value[None], 3, None, "text", [value]])
                state[part][rng.choice([key, key, key.replace("0", "7"), key[:-1], "module." + key])] = new
        for key in rng.sample(sorted(state["args"]), 2):
            state["args"][key] = rng.choice([None, "x", [1, [2]], 10**300, -1, float("nan"), float("inf"), {"a": 1}])
        for key in ("optimizer", "dino_loss", "args", "student"):
            if rng.random() < 0.1:
                state[key] = rng.choice([None, 3, "x", [], {}, {"center": "x"}, {"state": [], "param_groups": 1}])
        write_pth(tmp_path / "odd.pth", state)
        outcome(tmp_path / "odd.pth")
    assert read_pth(tmp_path / "odd.pth")
