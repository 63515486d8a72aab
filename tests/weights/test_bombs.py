"""Small files that claim much are refused in one line, at once, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.weights import importer
from dino_jax.weights.containers import read_weights
from dino_jax.weights.pth import write_pth
from tests.weights import bombs

HARMLESS = ("tuples", "shared", "memo far away")  # nothing is claimed: they are read, and hold no weights


def test_bombs_are_refused_at_once(tmp_path):
    files = bombs.write_all(tmp_path)
    command = [sys.executable, bombs.__file__, *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(files), run.stderr[-2000:]
    for file, (reason, seconds, peak) in zip(files, results, strict=True):
        assert seconds < 3, file.name  # about 0.5 alone on one core
        assert peak < 200, file.name
        if reason is None:
            assert file.name.startswith(HARMLESS), file.name
            with pytest.raises(UserError):
                importer.read(file)
        else:
            assert reason.startswith(str(file)), reason
            assert "\n" not in reason
            assert len(reason) < 500 + len(str(file))


def test_a_model_too_deep_is_refused_at_once(tmp_path):
    one = np.zeros((1,), np.float32)
    state = {f"blocks.{i}.norm1.weight": one for i in range(3000)}
    state |= {"blocks.0.attn.qkv.weight": one, "cls_token": one, "pos_embed": np.zeros((1, 5, 192), np.float32)}
    write_pth(tmp_path / "deep.pth", state | {"patch_embed.proj.weight": np.zeros((192, 3, 2, 2), np.float32)})
    with pytest.raises(UserError, match=r"deep.pth: 3000 blocks.*; more than 128"):
        importer.read(tmp_path / "deep.pth")


def test_thousands_of_networks_are_refused_at_once(tmp_path):
    one, begin = np.zeros((1,), np.float32), time.perf_counter()
    state = {f"p{i}.blocks.0.attn.qkv.weight": one for i in range(5000)}
    write_pth(tmp_path / "many.pth", state)
    with pytest.raises(UserError, match=r"several networks; choose .* and 4992 more"):
        importer.read(tmp_path / "many.pth")
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("name", ["x" * 1000, "a\x1b[31m", "a\nb"])
def test_names_stay_short_and_printable(tmp_path, name):
    write_pth(tmp_path / "f.pth", {name: np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="too long or not printable") as caught:
        importer.read(tmp_path / "f.pth")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["file.pth", "model.safetensors"])
def test_only_regular_files_are_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file but a named pipe"):
        read_weights(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file but a device"):
        read_weights("/dev/zero")
