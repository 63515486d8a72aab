from __future__ import annotations

import pytest

from dino_jax.errors import UserError
from dino_jax.eval import PROTOCOLS, everything, protocol
from dino_jax.eval.features import Frozen
from dino_jax.eval.published import PUBLISHED, name_of, table
from dino_jax.models import BACKBONES


def test_every_protocol_has_the_same_two_functions():
    for name in PROTOCOLS:
        module = protocol(name)
        assert module.default_config().is_locked and callable(module.evaluate)
        assert name in PUBLISHED
    with pytest.raises(UserError, match="did you mean linear"):
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


def test_tables_put_the_published_figure_beside_ours(vit):
    model = Frozen(BACKBONES["vit_small"](patch_size=16), {})
    assert name_of(model) == "S/16" and name_of(vit) is None
    lines = table("knn", {"top1_k20": 74.44444, "top1_k10": 74.0}, model).splitlines()
    assert lines[0].split() == ["knn", "here", "published", "(S/16)"]
    assert lines[1].split() == ["top1_k20", "74.44", "74.5"] and lines[2].split() == ["top1_k10", "74.00"]
    assert "published" not in table("knn", {"top1_k20": 1.0}, vit)
