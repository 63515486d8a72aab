"""Files that evaluations read, damaged in any way: one line that names the file, or the content."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile

import numpy as np
import pytest

from dino_jax import config_io
from dino_jax.config import default, flat_keys
from dino_jax.errors import UserError
from dino_jax.eval.gnd import read_gnd
from dino_jax.eval.results import load_arrays, save_arrays, to_json

EXPECTED = {"features": ("f", 2), "labels": ("i", 1)}
TRUTH = {
    "imlist": ["a", "b", "c"],
    "qimlist": ["q"],
    "gnd": [{"easy": [0], "hard": np.array([1]), "junk": [], "bbx": [0.5, 1.5, 2.0, 3.0]}],
}


def damaged(content: bytes, seed: str, count: int):
    """`content` with bytes changed, cut, repeated or inserted."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(len(data) or 1)
            match rng.randrange(4):
                case 0 if data:
                    data[place] ^= 1 << rng.randrange(8)
                case 1 if data:
                    data[place] = rng.randrange(256)
                case 2:
                    del data[place : place + rng.choice((1, 5, 1000))]
                case _:
                    data[place:place] = rng.randbytes(rng.choice((1, 4)))
        yield bytes(data)


def read_or_refuse(read, path):
    """What `read` gives, or None for a refusal in one line that names the file."""
    try:
        return read()
    except UserError as error:
        said = str(error)
    assert str(path) in said and "\n" not in said
    return None


def test_caches(tmp_path):
    path = tmp_path / "features.npz"
    save_arrays(path, features=np.ones((3, 4), np.float32), labels=np.arange(3))
    assert load_arrays(path, EXPECTED)["features"].shape == (3, 4)
    for content in damaged(path.read_bytes(), "npz", 400):
        path.write_bytes(content)
        found = read_or_refuse(lambda: load_arrays(path, EXPECTED), path)
        assert found is None or (np.isfinite(found["features"]).all() and found["labels"].ndim == 1)


@pytest.mark.parametrize(
    "arrays",
    [
        {"features": np.ones((3, 4))},
        {"features": np.ones((3, 4)), "labels": np.arange(3), "more": np.ones(1)},
        {"features": np.full((3, 4), np.nan), "labels": np.arange(3)},
        {"features": np.ones((3, 4)), "labels": np.arange(3.0)},
        {"features": np.ones(3), "labels": np.arange(3)},
        {"features": np.array([["a"]]), "labels": np.arange(3)},
        {"features": np.ones((3, 4)), "labels": np.array([True])},
    ],
)
def test_caches_with_other_contents(arrays, tmp_path):
    save_arrays(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=r"x\.npz: .*remove"):
        load_arrays(tmp_path / "x.npz", EXPECTED)


def test_caches_with_objects_bombs_or_compression(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, features=np.array([[{}]], object), labels=np.arange(3))
    with pytest.raises(UserError, match=r"x\.npz"):
        load_arrays(path, EXPECTED)
    np.savez_compressed(path, features=np.zeros((1000, 1000)), labels=np.arange(3))
    with pytest.raises(UserError, match="compressed"):
        load_arrays(path, EXPECTED)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("features.npy", header.getvalue())
        file.writestr("labels.npy", header.getvalue())
    with pytest.raises(UserError, match=r"has 0 bytes for float64 \(1000000, 1000000\)"):
        load_arrays(path, EXPECTED)


def test_ground_truth(tmp_path):
    path = tmp_path / "gnd.pkl"
    for protocol in (2, 4):
        for content in damaged(pickle.dumps(TRUTH, protocol=protocol), f"gnd {protocol}", 300):
            path.write_bytes(content)
            found = read_or_refuse(lambda: read_gnd(path), path)
            if found is not None:
                rows = np.concatenate([found["gnd"][0][key] for key in ("easy", "hard", "junk")])
                assert rows.dtype == np.int64 and (rows >= 0).all() and (rows < len(found["imlist"])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"easy": [1.5]}, "query 0, easy: 1.5 is not the number of an image"),
        ({"hard": [float("nan")]}, "query 0, hard: nan is not"),
        ({"hard": [float("inf")]}, "query 0, hard: refers to images beyond"),
        ({"junk": [2**40]}, "beyond the 3 in imlist"),
        ({"junk": [-1]}, "beyond the 3 in imlist"),
        ({"easy": ["0"]}, "easy: not a list of numbers"),
        ({"easy": [[0], [1, 2]]}, "easy: not a list of numbers"),
        ({"easy": [[0]]}, "easy: not a list of numbers"),
        ({"easy": None}, "easy: not a list of numbers"),
        ({"easy": [True]}, "easy: not a list of numbers"),
    ],
)
def test_ground_truth_with_other_values(change, message, tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(TRUTH | {"gnd": [TRUTH["gnd"][0] | change]}))
    with pytest.raises(UserError) as caught:
        read_gnd(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("change", [{"imlist": 3}, {"imlist": [1]}, {"qimlist": ["../q"]}, {"gnd": [3]}, {"gnd": {}}])
def test_ground_truth_of_other_types(change, tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(TRUTH | change))
    with pytest.raises(UserError, match=r"gnd\.pkl: "):
        read_gnd(path)


def test_saved_configurations():
    text = config_io.to_json(default())
    for content in damaged(text.encode(), "config", 400):
        read_or_refuse(
            lambda content=content: config_io.from_json(content.decode("utf-8", "replace"), "x.json"), "x.json"
        )


@pytest.mark.parametrize(
    "value", ['"300"', "null", "[]", "{}", '{"a": 1}', "NaN", "Infinity", "1e999", "true", "[[1]]"]
)
def test_saved_configurations_with_other_types(value):
    for key, declared in flat_keys():
        if (value == "null" and isinstance(declared.default, type)) or (declared.default is True and value == "true"):
            continue
        if (value == "true" and bool in declared.kinds) or (value == '"300"' and str in declared.kinds):
            continue
        content: object = "VALUE"
        for name in reversed(key.split(".")):
            content = {name: content}
        with pytest.raises(UserError, match=r"^run/config\.json: "):
            config_io.from_json(
                json.dumps({"format_version": 2, **content}).replace('"VALUE"', value), "run/config.json"
            )


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "null", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"optim": 3}']
)
def test_what_is_no_configuration(text):
    with pytest.raises(UserError, match=r"^run/config\.json: "):
        config_io.from_json(text, "run/config.json")


def test_json_is_valid_for_any_figure():
    value = {"a": np.float64("nan"), "b": [1, float("-inf")], "c": "x", "d": np.int64(3), "e": {"f": None, "g": True}}
    assert json.loads(to_json(value)) == {
        "a": "NaN",
        "b": [1, "-Infinity"],
        "c": "x",
        "d": 3,
        "e": {"f": None, "g": True},
    }
