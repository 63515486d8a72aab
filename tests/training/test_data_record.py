"""A run goes on with the data it began with, or says what has changed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.arrays_source import ArraySource
from dino_jax.data.identity import data_fingerprint, difference, identity_of
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.training.data_record import FILE, claim_data
from tests.tiny import tiny_config


def write(path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (level, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    for k in range(40):
        write(tmp_path / "images" / "ab"[k % 2] / f"{k:02}.png", k)
    return tmp_path / "images"


@pytest.fixture
def config():
    config = tiny_config()
    config.batch_size, config.epochs = 8, 2
    return config


def claim(workdir, config, folder, trained: int) -> None:
    claim_data(workdir, config, {"data.train": open_source(str(folder))}, trained)


def test_a_folder_that_grew_is_refused_and_can_be_accepted(folder, tmp_path, config, caplog):
    claim(tmp_path, config, folder, 0)
    claim(tmp_path, config, folder, 3)
    for k in range(40):
        write(folder / "a" / f"new{k}.png", k)
    with pytest.raises(
        UserError, match=r"data.train has changed since this run began: 80 images where there were 40"
    ) as caught:
        claim(tmp_path, config, folder, 3)
    for way in (
        f"--config.init_from={tmp_path}",
        "--config.run.accept_new_data=True",
        "epoch 0.30, of 20 steps in all",
    ):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)
    config.run.accept_new_data = True
    claim(tmp_path, config, folder, 3)
    assert "accepted: step 3 is then epoch 0.30, of 20 steps" in caplog.text
    config.run.accept_new_data = False
    claim(tmp_path, config, folder, 3)


def test_before_the_first_checkpoint_nothing_has_been_seen(folder, tmp_path, config):
    claim(tmp_path, config, folder, 0)
    write(folder / "a" / "new.png", 1)
    claim(tmp_path, config, folder, 0)
    claim(tmp_path, config, folder, 1)


@pytest.mark.parametrize("change", ["renamed", "moved to another class", "another content"])
def test_every_name_and_label_counts(folder, tmp_path, config, change):
    before = identity_of(open_source(str(folder)))
    if change == "renamed":
        (folder / "a" / "22.png").rename(folder / "a" / "22x.png")
    elif change == "moved to another class":
        (folder / "a" / "22.png").rename(folder / "b" / "22.png")
    else:
        write(folder / "a" / "00.png", 99)
    assert difference(before, identity_of(open_source(str(folder))))


def test_a_moved_folder_and_an_image_that_cannot_be_read_are_no_change(folder, tmp_path):
    before = identity_of(open_source(str(folder)))
    shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a" / "00.png").chmod(0)
    (tmp_path / "elsewhere" / "a" / "00.png").unlink()
    (tmp_path / "elsewhere" / "a" / "00.png").symlink_to("nowhere")
    moved = identity_of(open_source(str(tmp_path / "elsewhere")))
    assert moved["contents"]["0"] is None
    assert difference(before, moved) is None and difference(moved, before) is None


def test_sources_in_python_and_those_of_evaluations_count_too(tmp_path, config):
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8)
    one, other = ArraySource(images, np.arange(16)), ArraySource(images, np.arange(16)[::-1])
    assert data_fingerprint(one) != data_fingerprint(other)
    assert data_fingerprint(one) == data_fingerprint(ArraySource(images.copy(), np.arange(16)))
    claim_data(tmp_path, config, {"data.train": one, "eval.knn_test": one}, 0)
    with pytest.raises(UserError, match=r"eval.knn_test has changed .*other names, classes or labels"):
        claim_data(tmp_path, config, {"data.train": one, "eval.knn_test": other}, 1)


def test_an_older_run_is_compared_by_its_metrics(folder, tmp_path, config):
    lines = [{"step": step, "epoch": step / 5} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    claim(tmp_path, config, folder, 3)
    (tmp_path / FILE).unlink()
    for k in range(40):
        write(folder / "a" / f"new{k}.png", k)
    with pytest.raises(UserError, match="an epoch is 10 steps where it was 5"):
        claim(tmp_path, config, folder, 3)


@pytest.mark.parametrize("text", [b"\xff", b"{", b"[]", b'{"data.train": 1}', b'{"data.train": {"images": 1}}'])
def test_a_damaged_record_is_one_line(folder, tmp_path, config, text):
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(UserError, match=FILE) as caught:
        claim(tmp_path, config, folder, 3)
    assert "\n" not in str(caught.value)
