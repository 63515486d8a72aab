"""The verb `eval`: data, options, tables and errors, whatever the protocol."""

from __future__ import annotations

import json
import types

import jax
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.eval import run as verb
from dino_jax.eval.protocols import knn, linear, lowshot, retrieval, voc


@pytest.fixture
def loaded(monkeypatch):
    """A loaded model without weights."""
    backbone = types.SimpleNamespace(embed_dim=8, depth=1, patch_size=4, registers=0)
    model = types.SimpleNamespace(backbone=backbone, variables={}, config=default())
    monkeypatch.setattr(verb, "load", lambda checkpoint, heads: model)
    return model


def protocol_that(monkeypatch, evaluate, module=knn, **changes):
    monkeypatch.setattr(module, "PROTOCOL", module.PROTOCOL._replace(run=evaluate, **changes))


def test_a_file_and_overrides_reach_the_protocol(loaded, monkeypatch, tmp_path, capsys):
    seen = []
    protocol_that(
        monkeypatch, lambda model, data, config, workdir: seen.append((data, config, workdir)) or {"top1": 7.0}
    )
    (tmp_path / "mine.py").write_text(
        "from dino_jax.eval.protocols.knn import PROTOCOL\n"
        "def get_config():\n    config = PROTOCOL.default_config()\n    config.crop = 96\n    return config\n"
    )
    options = {
        "config_file": str(tmp_path / "mine.py"),
        "overrides": ["--config.k=(3,)"],
        "out": str(tmp_path / "o.json"),
    }
    work = str(tmp_path / "w")
    assert verb.evaluate("knn", "c", "d", workdir=work, **options) == {"top1": 7.0}
    ((data, config, workdir),) = seen
    assert (data, workdir, config.crop, config.k, config.temperature) == ("d", work, 96, (3,), 0.07)
    assert json.loads((tmp_path / "o.json").read_text()) == {"top1": 7.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["top1", "7.00"] and json.loads(lines[-1]) == {"top1": 7.0}
    (tmp_path / "mine.py").write_text("from dino_jax.config import default as get_config\n")
    with pytest.raises(UserError, match=r"mine\.py: not a configuration of knn"):
        verb.evaluate("knn", "c", "d", config_file=str(tmp_path / "mine.py"))


def test_no_memory_is_one_line_and_other_failures_stay_what_they_are(loaded, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 35800146688 bytes.")

    protocol_that(monkeypatch, full)
    with pytest.raises(UserError, match=r"out of memory on the devices: lower --config\.batch_size"):
        verb.evaluate("knn", "c", "d")

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    protocol_that(monkeypatch, broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        verb.evaluate("knn", "c", "d")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("knn", "k=(0,)"),
        ("knn", "k=()"),
        ("knn", "batch_size=0"),
        ("linear", "lrs=()"),
        ("linear", "epochs=0"),
        ("linear", "holdout=1.0"),
        ("finetune", "drop_path=1.0"),
        ("lowshot", "penalty=0.0"),
        ("vos", "topk=0"),
        ("voc", "masses=(1.5,)"),
        ("all", "voc.masses=(0.6,0.0)"),
    ],
)
def test_numbers_that_no_protocol_can_use_are_named_before_anything_is_loaded(name, setting):
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"--config\.{key}=.*must"):
        verb.evaluate(name, "absent", "absent", overrides=[f"--config.{setting}"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("knn", "resize=100 crop=112", "--config.crop=112 --config.resize=100: each image would get a black frame"),
        ("knn", "temperature=inf", "--config.temperature=inf: must be finite"),
        ("knn", "k=(5,5)", "--config.k=(5, 5): the values must differ"),
        ("all", "linear.resize=100", "--config.linear.crop=224 --config.linear.resize=100: each image"),
        ("finetune", "epochs=3", "--config.warmup_epochs=5 --config.epochs=3: the warm-up is longer"),
        (
            "finetune",
            "lr=1e-6",
            "--config.min_lr=1e-05 --config.lr=1e-06 --config.batch_size=1024: the rate would rise",
        ),
        ("dense", "scale=(1.0,0.5)", "--config.scale=(1.0, 0.5): low, then high"),
        ("vos", "threads=100000", "--config.threads=100000: must be at most 1024"),
        ("lowshot", "shares=(1e999,)", "--config.shares=(inf,): must be finite"),
        ("linear", "lrs=(0.0,)", "--config.lrs=(0.0,): must be greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_named_before_anything_is_loaded(name, settings, message):
    with pytest.raises(UserError) as caught:
        verb.evaluate(name, "absent", "absent", overrides=[f"--config.{setting}" for setting in settings.split()])
    assert str(caught.value).startswith(message)


def test_sizes_that_the_patches_do_not_divide_are_named_by_their_key(loaded, monkeypatch, tmp_path):
    protocol_that(monkeypatch, lambda *_: {"top1": 7.0})
    assert verb.evaluate("knn", "c", "d", overrides=["--config.crop=32"]) == {"top1": 7.0}
    with pytest.raises(UserError, match=r"--config\.crop=35: not divisible into patches of 4 pixels: set it to 32"):
        verb.evaluate("knn", "c", "d", overrides=["--config.crop=35"])
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"--config\.linear\.crop=35: not divisible"):
        verb.evaluate("all", "c", str(tmp_path), overrides=["--config.linear.crop=35"])


def test_what_cannot_be_written_is_named_before_the_long_part(loaded, monkeypatch, tmp_path):
    protocol_that(monkeypatch, lambda *_: pytest.fail("evaluated"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*file/o\.json: cannot be written"):
        verb.evaluate("knn", "c", "d", out=str(tmp_path / "file" / "o.json"))
    with pytest.raises(UserError, match=r"--workdir=.*file/x: cannot be written: "):
        verb.evaluate("knn", "c", "d", workdir=str(tmp_path / "file" / "x"))


def test_an_output_that_is_a_folder_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(verb, "load", lambda *_, **__: pytest.fail("loaded"))
    for out in (tmp_path, f"{tmp_path}/new/"):
        with pytest.raises(UserError, match=f"^--out={out}: this is a folder: name a file in it"):
            verb.evaluate("knn", "c", "d", out=str(out))
    with pytest.raises(UserError, match=r"^--out=/dev/null: .*not a regular file"):
        verb.evaluate("knn", "c", "d", out="/dev/null")


def test_data_sets_are_found_in_and_below_a_folder(tmp_path):
    for folder in (
        "imagenet/train",
        "imagenet/val",
        "DAVIS/ImageSets/2017",
        "VOCdevkit/VOC2012/ImageSets/Segmentation",
    ):
        (tmp_path / folder).mkdir(parents=True)
    found = verb.find(str(tmp_path))
    assert found == {
        **dict.fromkeys(("knn", "linear", "lowshot"), str(tmp_path / "imagenet")),
        "vos": str(tmp_path / "DAVIS"),
        **dict.fromkeys(("voc", "dense"), str(tmp_path)),
    }
    with pytest.raises(UserError, match="no protocol's data found"):
        verb.find(str(tmp_path / "imagenet" / "train"))
    with pytest.raises(UserError, match="no such folder"):
        verb.find(str(tmp_path / "nothing"))


def test_pairs_of_sources_are_data_too(tmp_path):
    assert set(verb.find("arrays:a.npz,arrays:b.npz")) == {"knn", "linear", "lowshot"}
    scenes = verb.find("scenes:train?size=9,scenes:val?size=3")
    assert scenes["dense"] == scenes["knn"] == "scenes:train?size=9,scenes:val?size=3"
    assert scenes["voc"] == scenes["vos"] == "scenes:val?size=3"
    assert "retrieval" not in scenes


def test_what_is_absent_is_said_and_what_fails_does_not_stop_the_others(loaded, tmp_path, monkeypatch, caplog, capsys):
    def broken(*_):
        raise UserError("a mask is missing")

    protocol_that(monkeypatch, lambda model, data, config, workdir: {"k": len(config.k)})
    protocol_that(monkeypatch, broken, voc)
    for module in (linear, lowshot):
        protocol_that(monkeypatch, broken, module, data=retrieval.PROTOCOL.data)
    for folder in ("train", "val", "images", "masks"):
        (tmp_path / folder).mkdir()
    out = tmp_path / "o.json"
    with caplog.at_level("INFO"), pytest.raises(UserError, match=r"1 of 2 protocols failed: voc \(a mask is missing\)"):
        verb.evaluate("all", "c", str(tmp_path), overrides=["--config.knn.k=(3,)"], out=str(out))
    assert json.loads(out.read_text()) == {"knn/k": 1}
    assert capsys.readouterr().out.splitlines()[0].startswith("knn ")
    for notice in ("vos is skipped: no DAVIS", "retrieval is skipped: no rox", "finetune is skipped"):
        assert notice in caplog.text


def test_a_network_without_patches_leaves_their_protocols_out(loaded, tmp_path, caplog):
    loaded.backbone.patch_size = None
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with caplog.at_level("INFO"):
        assert verb.evaluate("all", "c", str(tmp_path)) == {}
    assert "voc is skipped: it needs patch tokens" in caplog.text
    for name in ("copydetection", "vos", "voc", "dense"):
        with pytest.raises(UserError, match=f"{name} needs patch tokens, which this backbone does not have"):
            verb.evaluate(name, "c", str(tmp_path))
