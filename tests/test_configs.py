"""Every file in configs/ builds; keys, types and values that are wrong get one clear line."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from dino_jax import config_io
from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.eval.protocols import finetune
from dino_jax.training.step import init_state, make_recipe

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_builds(path):
    recipe = make_recipe(config_io.load(str(path)), steps_per_epoch=10)
    state = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    assert state.objectives["dino"]["center"].shape == (recipe.config.head.out_dim,)


@pytest.mark.parametrize("path", sorted((FOLDER / "finetune").glob("*.py")), ids=lambda path: path.stem)
def test_fine_tuning_builds(path):
    config = config_io.read(str(path))
    assert config.is_locked
    assert config_io.flatten(config).keys() == config_io.flatten(finetune.PROTOCOL.default_config()).keys()
    peak = config.lr * config.batch_size / 512
    assert config.warmup_lr < peak and config.min_lr < peak  # the warm-up rises, the cosine falls
    finetune.make_optimizer(config, 10).init({"backbone": {"norm": {"scale": np.ones(3)}}})


@pytest.mark.parametrize("name", ["vit_s16", "vit_s16.py", str(FOLDER / "vit_s16.py")])
def test_names_hold_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_io.load(name, ["--config.epochs=3"]).to_dict() == config_io.load(FOLDER / "vit_s16.py").to_dict() | {
        "epochs": 3
    }


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_s16.py").write_text((FOLDER / "resnet50.py").read_text())
    assert config_io.load("vit_s16.py").model.name == "resnet50"
    assert config_io.load("vit_s16").model.name == "vit_small"


def test_every_file_has_a_name():
    assert set(config_io.named().values()) == set(FOLDER.rglob("*.py"))
    assert config_io.read("finetune/cifar10") == config_io.read(FOLDER / "finetune" / "cifar10.py")


def test_every_key_is_described():
    said = config_io.describe()
    assert all(f"--config.{key}=" in said or f"--config.{key} (unset" in said for key in config_io.flatten(default()))


def test_another_xcit_builds():
    overrides = ["--config.model.name=xcit_medium_24", "--config.model.patch_size=8"]
    recipe = make_recipe(config_io.load(str(FOLDER / "xcit_s12_p16.py"), overrides), steps_per_epoch=10)
    state = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    assert "cls_attn_blocks_1" in state.student["params"]["backbone"]


# What the official main_dino.py does when called without arguments (RECIPE: defaults of the code, not of the paper).
OFFICIAL = {
    "model.name": "vit_small",
    "model.patch_size": 16,
    "head.out_dim": 65536,
    "head.norm_last_layer": True,
    "head.use_bn": False,
    "teacher.momentum": 0.996,
    "teacher.warmup_temp": 0.04,
    "teacher.temp": 0.04,
    "teacher.warmup_temp_epochs": 0,
    "optim.name": "adamw",
    "optim.lr": 0.0005,
    "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer": 1,
    "optim.warmup_epochs": 10,
    "model.drop_path": 0.1,
    "crops.global_scale": (0.4, 1.0),
    "crops.local_scale": (0.05, 0.4),
    "crops.local_count": 8,
    "epochs": 100,
}


def test_defaults_are_the_official_ones():
    flat = config_io.flatten(default())
    assert {key: flat[key] for key in OFFICIAL} == OFFICIAL


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.head.out_dim=1", r"head\.out_dim=1: must be at least 2"),
        ("--config.optim.lr=inf", r"optim\.lr=inf: must be finite"),
        ("--config.optim.b1=1.0", r"optim\.b1=1\.0: must be at least 0 and less than 1"),
        ("--config.crops.ratio=(1.3,0.7)", r"crops\.ratio=\(1\.3, 0\.7\): low, then high"),
        ("--config.crops.blur_radius=(2.0,0.1)", r"crops\.blur_radius=\(2\.0, 0\.1\): low, then high"),
        ("--config.optim.rl=1", r"no key 'optim\.rl'; did you mean 'optim\.lr'"),
        ("--config.momentum=0.9", r"no key 'momentum'; did you mean '\w+\.momentum'"),
        ("--config.epochs=many", r"--config\.epochs=many: this key takes a value of type int"),
        ("--config.model.heads=few", r"--config\.model\.heads=few: this key takes a value of type int"),
        ("--config.optim=adamw", r"no key 'optim'"),
        ("--config.optim.name=adam", r"optim\.name='adam': must be one of adamw, sgd, lars; did you mean 'adamw'"),
        ("--config.crops.blur_prob=0.5", r"crops\.blur_prob=\(0\.5,\): 3 values are needed"),
        ("--config.crops.global_size=(a,b)", r"crops\.global_size=.*: (int|2) values are needed, such as \(224, 224\)"),
        ("--config.crops.global_size=32.5", r"crops\.global_size=\(32\.5, 32\.5\): int values are needed"),
        ("--config.crops.local_scale=(0.5,0.1)", r"crops\.local_scale=\(0\.5, 0\.1\)"),
        ("--config.batch_size=0", r"batch_size=0: must be at least 1"),
        ("--config.teacher.temp=0", r"teacher\.temp=0\.0: must be greater than 0"),
        ("--config.model.heads=0", r"model\.heads=0: must be at least 1"),
        ("--config.crops.local_size=0", r"crops\.local_size=\(0, 0\): must be at least 1"),
        ("--config.crops.local_count=-1", r"crops\.local_count=-1: must be at least 0"),
        ("--config.crops.flip_prob=50", r"crops\.flip_prob=50\.0: must be between 0 and 1"),
        ("--config.model.drop_path=1", r"model\.drop_path=1\.0: must be at least 0 and less than 1"),
        ("--config.model.in_chans=4", r"data\.mean=.*one value for each of the 4 channels"),
        ("--config.run.profile_steps=(5,2)", r"run\.profile_steps=\(5, 2\): the first step and the last one"),
        ("--config.run.mesh.fsdp=0", r"run\.mesh: an axis cannot have 0 devices"),
        ("--config.lr", r"--config\.lr: overrides have the form --config\.KEY=VALUE"),
    ],
)
def test_one_clear_line_for(argument, message):
    with pytest.raises(UserError, match=message) as caught:
        config_io.check(config_io.override(default(), [argument]))
    assert "\n" not in str(caught.value)


def test_overrides_take_the_types_of_their_keys():
    arguments = [
        "optim.lr=1e-3",
        "crops.global_size=96",
        "crops.local_size=64",
        "crops.local_size=(32,48)",
        "run.tensorboard=false",
    ]
    arguments += ["init_from=weights.pth", "run.checkpoint_every=2", "eval.knn_train=/data/a=b"]
    config = config_io.override(default(), [f"--config.{argument}" for argument in arguments])
    assert config.optim.lr == 1e-3
    assert config.crops.global_size == (96, 96)
    assert config.crops.local_size == (32, 48)
    assert config.run.tensorboard is False
    assert config.init_from == "weights.pth"
    assert config.run.checkpoint_every == 2.0
    assert config.eval.knn_train == "/data/a=b"


def test_json_round_trip_and_comparison():
    config = config_io.override(default(), ["--config.crops.local_count=6", "--config.run.workers=8"])
    again = config_io.from_json(config_io.to_json(config))
    assert again == config
    assert config_io.differences(default(), again) == ["crops.local_count: 8 -> 6"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 3", r"get_config\(\) must return a ConfigDict, not int"),
        ("x = 1", r"KeyError: 'get_config'"),
        ("import nothing_of_this_name", r"ModuleNotFoundError"),
        ("def get_config(:", r"SyntaxError"),
        ("def get_config(): return open('gone')", r"FileNotFoundError: .*gone"),
        ("from ml_collections import ConfigDict as get_config", r"not a training configuration.*'batch_size'"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        config_io.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.py: there is no such file"):
        config_io.load(str(tmp_path / "absent.py"))
