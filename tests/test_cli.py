"""The command line, verb by verb, on one tiny run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dino_jax.cli import main

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders `train` and `val` of small noisy images."""
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
    said = capsys.readouterr().out
    assert "top1_k5" in said and json.loads(said.splitlines()[-1]) == figures


def test_features_of_a_folder(run, classes, tmp_path, capsys):
    out = tmp_path / "features.npz"
    assert main(["features", f"--checkpoint={run}", f"--images={classes / 'val'}", f"--out={out}", "--resize=32"]) == 0
    with np.load(out, allow_pickle=False) as saved:
        assert any(saved[name].shape == (8, 32) for name in saved.files)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"images": 8, "unreadable": 0}


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
        (["eval", "kmn", "--checkpoint=x", "--data=y"], "unknown protocol 'kmn'; did you mean 'knn'?"),
        (["eval", "knn", "--checkpoint=absent", "--data=y"], "absent"),
        (["eval", "all", "--checkpoint=x", "--data=y", "--config.k=3"], "--config.k=3"),
        (["export", "--checkpoint=absent", "--format=gguf", "--out=x"], "--format=gguf"),
        (["import", "absent.pth", "--out=x"], "absent.pth"),
        (["features", "--checkpoint=x", "--images=y", "--out=z", "--config.k=1"], "takes no configuration"),
        (["train", "--config=absent.py", "--workdir=x"], "absent.py: there is no such file"),
        (["train", "--config=vit_s61", "--workdir=x"], "--config=vit_s61: there is no such file or name; did you mean"),
        (["plan", "--config=finetune/cars", "--topology=cpu"], "--config=finetune/cars: not a training configuration"),
        (["bench", "loss", "--config=resnet"], "(names: cifar10, finetune/cars, "),
        (["eval", "knn", "--checkpoint=x", "--data=y", "--config=nan"], "--config=nan: there is no such file or name"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("dino-jax: error: ")
    assert message in said[0]


def printed(arguments, capsys):
    """The output of a command that exits with status 0."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_verb(capsys):
    said = printed(["--help"], capsys)
    for file in sorted((ROOT / "dino_jax").glob("*/*_verb.py")):
        verb = file.name.removesuffix("_verb.py")
        assert f"\n    {verb} " in said
        assert f"usage: dino-jax {verb} " in printed([verb, "--help"], capsys)


@pytest.mark.parametrize("verb", [["train"], ["plan"], ["doctor"], ["bench", "step"]])
def test_help_has_the_keys_where_asked(verb, capsys):
    assert "--config.optim.lr" not in printed([*verb, "--help"], capsys)
    said = " ".join(printed([*verb, "--help-config"], capsys).split())
    assert "--config.optim.lr=0.0005 learning rate for 256 images; with lr_scaling=sqrt for 1024 (at least 0)" in said
    assert "--config.model.depth (unset: int) number of blocks;" in said
    assert "(one of adamw, sgd, lars)" in said


def fresh(*arguments, **options):
    """Runs Python in a separate process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **options)


def test_help_imports_nothing_heavy():
    code = "import sys; from dino_jax.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    loaded = {name.split(".")[0] for name in fresh("-c", code).stdout.splitlines()[-1].split()}
    assert "argparse" in loaded and not loaded & {"absl", "flax", "grain", "jax", "ml_collections", "numpy", "orbax"}


def test_help_into_a_closed_pipe(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dino_jax", "train", "--help-config"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("config", "dino_jax.config.default().epochs == 100"),
        ("show", "dino_jax.show.__name__ == 'dino_jax.show'"),
        ("load", "callable(dino_jax.load)"),
        ("train", "callable(dino_jax.train)"),
        ("load_config", "dino_jax.load_config('vit_s16').batch_size == 512"),
    ],
)
def test_attributes_of_the_package(name, use, tmp_path):
    """Each separately, in a fresh interpreter; importing the package itself loads nothing heavy."""
    code = "import sys, dino_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules;"
    done = fresh("-c", f"{code} assert {name!r} in dir(dino_jax); assert {use}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_functions_of_the_package_stay_functions():
    import dino_jax
    import dino_jax.config_io
    import dino_jax.inference.model
    import dino_jax.training.loop
    import dino_jax.weights.load

    assert dino_jax.train is dino_jax.training.loop.train
    assert dino_jax.load is dino_jax.inference.model.load
    assert dino_jax.load_config is dino_jax.config_io.load
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        assert dino_jax.absent


def test_help_of_a_protocol_lists_its_keys(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "vos", "--help"])
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: dino-jax eval" in said and "--config.radius=12" in said
    assert "window radius in patches, in rows and columns; 0: the whole frame (at least 0)" in said
    assert main(["eval", "vso", "--help"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--workdir=x", "--config=y", "--lr=3"]])
def test_misspelt_commands_exit_with_status_2(arguments, capsys):
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dino-jax: error: ") and " --help`" in line
