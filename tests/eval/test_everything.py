from __future__ import annotations

import types

import pytest

from dino_jax import config_io
from dino_jax.errors import UserError
from dino_jax.eval import PROTOCOLS, everything, protocol
from dino_jax.eval.features import Frozen
from dino_jax.eval.published import NAMES, PUBLISHED, SOURCES, name_of, table
from dino_jax.models import BACKBONES


def test_every_protocol_has_the_same_two_functions():
    for name in PROTOCOLS:
        module = protocol(name)
        assert module.default_config().is_locked and callable(module.evaluate)
        assert name in PUBLISHED
    with pytest.raises(UserError, match="did you mean 'linear'"):
        protocol("liner")


def test_data_sets_are_found_in_and_below_a_folder(tmp_path):
    for folder in (
        "imagenet/train",
        "imagenet/val",
        "DAVIS/ImageSets/2017",
        "VOCdevkit/VOC2012/ImageSets/Segmentation",
    ):
        (tmp_path / folder).mkdir(parents=True)
    found = everything.find(str(tmp_path))
    assert found == {
        **dict.fromkeys(("knn", "linear", "lowshot"), str(tmp_path / "imagenet")),
        "vos": str(tmp_path / "DAVIS"),
        **dict.fromkeys(("voc", "dense"), str(tmp_path)),
    }
    with pytest.raises(UserError, match="no data set"):
        everything.find(str(tmp_path / "imagenet" / "train"))
    with pytest.raises(UserError, match="no such folder"):
        everything.find(str(tmp_path / "nothing"))


def test_pairs_of_sources_are_data_too(tmp_path):
    assert set(everything.find("arrays:a.npz,arrays:b.npz")) == {"knn", "linear", "lowshot"}
    scenes = everything.find("scenes:train?size=9,scenes:val?size=3")
    assert scenes["dense"] == scenes["knn"] == "scenes:train?size=9,scenes:val?size=3"
    assert scenes["voc"] == scenes["vos"] == "scenes:val?size=3"
    assert "retrieval" not in scenes


def test_what_is_absent_is_said_and_what_fails_does_not_stop_the_others(vit, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise UserError("a mask is missing")

    def protocol_of(evaluate):
        return types.SimpleNamespace(evaluate=evaluate)

    config = config_io.override(everything.default_config(), ["--config.knn.k=(3,)"])
    modules = {"knn": protocol_of(lambda m, data, config, w: {"k": len(config.k)}), "voc": protocol_of(broken)}
    parts = {name: everything.PARTS[name]._replace(module=module) for name, module in modules.items()}
    parts |= {name: everything.PARTS[name]._replace(fits=lambda folder: False) for name in ("linear", "lowshot")}
    monkeypatch.setattr(everything, "PARTS", everything.PARTS | parts)
    for folder in ("train", "val", "images", "masks"):
        (tmp_path / folder).mkdir()
    seen: list = []
    with caplog.at_level("INFO"), pytest.raises(UserError, match=r"1 of 2 protocols failed: voc \(a mask is missing\)"):
        seen.extend(everything.evaluate(vit, str(tmp_path), config))
    assert seen == [("knn", {"k": 1})]
    for notice in ("vos is left out: no DAVIS", "retrieval is left out: no rox", "finetune is left out"):
        assert notice in caplog.text


def test_a_network_without_patches_leaves_their_protocols_out(tmp_path, caplog):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    model = Frozen(BACKBONES["resnet50"](), {})
    with caplog.at_level("INFO"):
        assert list(everything.evaluate(model, str(tmp_path), everything.default_config())) == []
    assert "voc is left out: it needs patches" in caplog.text


def test_tables_put_the_published_figure_beside_ours(vit):
    model = Frozen(BACKBONES["vit_small"](patch_size=16), {})
    assert name_of(model) == "S/16" and name_of(vit) is None
    lines = table("knn", {"top1_k20": 74.44444, "top1_k10": 74.0}, model).splitlines()
    assert lines[0].split() == ["knn", "here", "published", "(S/16)"]
    assert lines[1].split() == ["top1_k20", "74.44", "74.5"] and lines[2].split() == ["top1_k10", "74.00"]
    assert lines[-1] == "  published: ImageNet; the official README"
    assert "published" not in table("knn", {"top1_k20": 1.0}, vit)
    absent = table("voc", {"jaccard_60": 44.0}, model).splitlines()  # what was not asked for still has its figure
    assert absent[2].split() == ["jaccard_60_random", "22.0"]


def test_published_figures_have_their_protocols_names_and_a_source():
    for name, rows in PUBLISHED.items():
        assert not rows or name in SOURCES
        for figures in rows.values():
            assert set(figures) <= set(NAMES.values())
    released = [("resnet50", {})]
    released += [(name, {"patch_size": patch}) for name in ("vit_small", "vit_base") for patch in (16, 8)]
    released += [(name, {"patch_size": patch}) for name in ("xcit_small_12", "xcit_medium_24") for patch in (16, 8)]
    found = [name_of(Frozen(BACKBONES[name](**options), {})) for name, options in released]
    assert set(found) == set(NAMES.values())
