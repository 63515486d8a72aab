"""The benchmarks run and print their figures in the last line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from dino_jax.cli import main
from dino_jax.config import default
from dino_jax.tools.bench import JpegSource, bench_input


def test_generated_jpegs_are_like_imagenets():
    source = JpegSource(2)
    images = [Image.open(io.BytesIO(source[i].image)) for i in range(2)]
    assert all(image.size == (500, 375) and image.format == "JPEG" for image in images)
    assert 80_000 < len(source[0].image) < 160_000
    assert source[0].image == source[2].image != source[1].image


def test_input_measures_every_part(tmp_path, capsys, monkeypatch):
    """On small images and crops, so that it takes a second."""
    monkeypatch.setattr("dino_jax.tools.bench.WARM_UP", 0.05)
    rng = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / f"{index}.jpg", quality=90)
    small = {"crops.global_size": 64, "crops.local_size": 32, "data.canvas": 128, "batch_size": 8}
    overrides = [f"--config.{key}={value}" for key, value in small.items()]
    assert main(["bench", "input", f"--source={tmp_path}", "--seconds=0.2", "--steps=0", *overrides]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert results["batch_size"] == 8
    assert [line.split()[0] for line in table] == list(results)
    assert results["decode_images_per_s_per_core"] > results["device_images_per_s_per_core"] > 0
    assert results["ratio"] == pytest.approx(
        results["device_images_per_s_per_core"] / results["host_images_per_s_per_core"], rel=1e-3
    )
    assert results["ratio"] > 2


TINY = {
    "batch_size": 8,
    "model.depth": 1,
    "model.embed_dim": 32,
    "model.heads": 2,
    "head.out_dim": 64,
    "head.hidden_dim": 32,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.local_count": 2,
}


@pytest.mark.extra
@pytest.mark.parametrize(("what", "rate"), [("step", "images_per_s"), ("loss", "gb_per_s")])
def test_the_step_and_the_loss_alone(what, rate, capsys):
    overrides = [f"--config.{key}={value}" for key, value in TINY.items()]
    assert main(["bench", what, "--steps=2", *overrides]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[rate] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input", "--source=nowhere"], "nowhere: no such file or folder"),
        (["input", "--seconds=0"], "--seconds: must be a number from"),
        (["step", "--steps=0"], "--steps=0"),
        (["loss", "--source=x"], "bench loss reads no images"),
        (["input", "--config=nowhere.py"], "there is no such file"),
        (["input", "--config.batch_sise=8"], "did you mean 'batch_size'"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dino-jax: error: ") and message in line


@pytest.mark.extra
def test_input_with_training(monkeypatch):
    monkeypatch.setattr("dino_jax.tools.bench.WARM_UP", 0.05)
    config = default()
    config.batch_size, config.model.name, config.head.out_dim, config.head.hidden_dim = 8, "vit_tiny", 64, 32
    config.crops.global_size, config.crops.local_size, config.crops.local_count = (32, 32), (16, 16), 2
    config.data.canvas = 64
    results = bench_input(config, "scenes:train?size=64&image_size=64", seconds=0.1, steps=2)
    for mode in ("host", "device"):
        share = results[f"train_{mode}_images_per_s"] / results["train_resident_images_per_s"]
        assert results[f"share_{mode}"] == pytest.approx(share) and share > 0
