"""The command line, verb by verb, on one tiny run."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from dino_jax.cli import main

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders `train` and `val` of small noisy pictures."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 16), ("val", 4)):
        for name in ("dark", "light"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 36, 3)) + (127 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(classes, tmp_path_factory):
    """The workdir of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "config.py"
    file.write_text("from tests.tiny import tiny_config as get_config\n")
    overrides = ["epochs=1", "run.stop_after=2", f"data.train={classes / 'train'}", "batch_size=8", "run.mesh.data=1"]
    arguments = [f"--config.{override}" for override in overrides]
    assert main(["train", f"--config={file}", f"--workdir={folder / 'work'}", *arguments]) == 0
    return folder / "work"


def test_eval_prints_a_table_and_writes_json(run, classes, tmp_path, capsys):
    out = tmp_path / "figures" / "knn.json"
    settings = ["--config.k=(5,)", "--config.resize=0", "--config.crop=32"]
    assert main(["eval", "knn", f"--checkpoint={run}", f"--data={classes}", f"--out={out}", *settings]) == 0
    figures = json.loads(out.read_text())
    assert set(figures) == {"top1_k5", "top5_k5"}
    assert all(0 <= value <= 100 for value in figures.values())
    assert "top1_k5" in capsys.readouterr().out


def test_features_of_a_folder(run, classes, tmp_path):
    out = tmp_path / "features.npz"
    assert main(["features", f"--checkpoint={run}", f"--images={classes / 'val'}", f"--out={out}", "--resize=32"]) == 0
    with np.load(out, allow_pickle=False) as saved:
        assert any(saved[name].shape == (8, 32) for name in saved.files)


def test_export_and_import_give_the_weights_back(run, tmp_path):
    file, again = tmp_path / "weights.pth", tmp_path / "again"
    assert main(["export", f"--checkpoint={run}", "--format=official", f"--out={file}"]) == 0
    assert main(["import", str(file), "--heads=2", f"--out={again}"]) == 0
    second = tmp_path / "second.pth"
    assert main(["export", f"--checkpoint={again}", "--format=official", f"--out={second}"]) == 0
    from dino_jax.weights.pth import read_pth

    first, last = read_pth(file)["teacher"], read_pth(second)["teacher"]
    assert first.keys() == last.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, last[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "kmn", "--checkpoint=x", "--data=y"], "did you mean 'knn'?"),
        (["eval", "knn", "--checkpoint=absent", "--data=y"], "absent"),
        (["eval", "all", "--checkpoint=x", "--data=y", "--config.k=3"], "--config.k=3"),
        (["export", "--checkpoint=absent", "--format=gguf", "--out=x"], "--format=gguf"),
        (["import", "absent.pth", "--out=x"], "absent.pth"),
        (["features", "--checkpoint=x", "--images=y", "--out=z", "--config.k=1"], "takes no configuration"),
        (["train", "--config=absent.py", "--workdir=x"], "absent.py: there is no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("dino-jax: error: ")
    assert message in said[0]


def test_help_of_a_protocol_lists_its_keys(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "vos", "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert "usage: dino-jax eval" in said and "--config.radius = 12  # reach of a patch, in rows and in columns" in said
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "vso", "--help"])
    assert exit_.value.code == 2 and "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--workdir=x", "--config=y", "--lr=3"]])
def test_misspelt_commands_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err
