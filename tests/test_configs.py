"""Every file in configs/ builds; keys, types and values that are wrong get one clear line."""

from __future__ import annotations

import math
import pathlib

import jax
import numpy as np
import pytest

from dino_jax import config_io
from dino_jax.config import KEYS, default, flat_keys
from dino_jax.errors import UserError
from dino_jax.eval.protocol import get, names
from dino_jax.eval.protocols import finetune
from dino_jax.parallel import sharding
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
    assert config_io.load(name, ["--config.epochs=30"]).to_dict() == config_io.load(FOLDER / "vit_s16.py").to_dict() | {
        "epochs": 30
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
        ("--config.run.mesh.fsdp=0", r"run\.mesh\.fsdp=0 .*: an axis cannot have 0 devices"),
        ("--config.lr", r"--config\.lr: overrides have the form --config\.KEY=VALUE"),
    ],
)
def test_one_clear_line_for(argument, message):
    with pytest.raises(UserError, match=message) as caught:
        config_io.check(config_io.override(default(), [argument]))
    assert "\n" not in str(caught.value)


def values(key, bad):
    return bad if not isinstance(key.default, tuple) else (bad,) * max(len(key.default), 1)


def test_no_float_key_takes_what_float32_does_not_hold():
    """inf and nan, 1e39 (inf on a device), and for bounds above 0 also 1e-60 (0 on a device)."""
    protocols = {name: get(name).keys for name in names()}
    floats = [(name, key) for name, key in flat_keys({"train": KEYS} | protocols) if float in key.kinds]
    assert len(floats) > 50
    for name, key in floats:
        for bad in (math.inf, -math.inf, math.nan, 1e39):
            assert key.error(values(key, bad)) is not None, (name, bad)
        if key.within.startswith("(0"):
            assert key.error(values(key, 1e-60)) is not None, name


def test_no_key_takes_another_type_or_a_number_beyond_int32():
    protocols = {name: get(name).keys for name in names()}
    for name, key in flat_keys({"train": KEYS} | protocols):
        for bad in ({}, [], b"", object(), "" if key.default != "" else 1, 10**20 if str not in key.kinds else 1.5):
            assert key.error(bad) is not None, (name, bad)
            if not (key.default == () and isinstance(bad, float)):
                assert key.error((bad,)) is not None, (name, bad)
        if bool not in key.kinds:
            assert key.error(values(key, True)) is not None, name
        if key.ordered:
            assert key.error(key.default[::-1]) == "low, then high: swap them"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("epochs=5", "optim.warmup_epochs=10 epochs=5: the warm-up is longer than the run"),
        (
            "optim.min_lr=0.1",
            "optim.min_lr=0.1 optim.lr=0.0005 batch_size=1024 optim.lr_scaling='linear': the rate",
        ),
        ("optim.lr=1e-6 batch_size=128", "optim.min_lr=1e-06 optim.lr=1e-06 batch_size=128"),
        ("teacher.temp=0.07 teacher.warmup_temp_epochs=101", "teacher.warmup_temp_epochs=101 epochs=100"),
        ("data.render=device data.canvas=200", "data.canvas=200 crops.global_size=(224, 224)"),
        ("data.mean=(124,116,104)", "data.mean=(124, 116, 104): pixel values are in 0..1: divide by 255"),
        ("data.std=(58,57,57)", "data.std=(58, 57, 57): pixel values are in 0..1"),
        ("eval.knn_every=1 eval.crop=300", "eval.crop=300 eval.resize=256"),
        ("run.threads=100000", "run.threads=100000: must be at most 1024"),
        ("run.mesh.data=-2", "run.mesh.data=-2: must be between -1 and "),
        ("model.name=", "model.name='': must not be empty"),
        ("data.train=", "data.train='': must not be empty"),
        ("seed=100000000000000000000", "seed=100000000000000000000: "),
        ("run.checkpoint_every=inf", "run.checkpoint_every=inf: must be finite"),
    ],
)
def test_keys_that_contradict_each_other_are_named(overrides, message):
    with pytest.raises(UserError) as caught:
        config_io.check(config_io.override(default(), [f"--config.{argument}" for argument in overrides.split()]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "crops.local_size=50",
            "an input of 50 x 50 pixels is not divisible into patches of 16: change model.patch_size",
        ),
        ("model.heads=7", "model.embed_dim 384 is not divisible by model.heads 7"),
        ("model.dtype=float64", "model.dtype=float64 would compute in float32: set JAX_ENABLE_X64=1"),
        ("epochs=2147483647", "epochs=2147483647: 21474836470 steps are more than"),
        ("run.mesh.data=3", "does not fit 1 device"),
    ],
)
def test_what_the_model_or_the_devices_contradict_is_named(override, message):
    config = config_io.load("vit_s16", [f"--config.{override}"])
    with pytest.raises(UserError) as caught:
        (make_recipe(config, steps_per_epoch=10), sharding.make_mesh(config.run.mesh, jax.devices()[:1]))
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["optim.freeze_last_layer=1000", "crops.global_size=64"])
def test_what_is_only_unusual_is_a_warning(override, caplog):
    config_io._warn.cache_clear()
    for _ in range(2):
        config_io.check(config_io.override(default(), [f"--config.{override}"]))
    assert len(caplog.records) == 1 and override.partition("=")[0] in caplog.text


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
