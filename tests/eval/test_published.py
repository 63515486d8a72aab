from __future__ import annotations

import pytest

from dino_jax.config import default
from dino_jax.eval import protocol
from dino_jax.eval.protocol import Protocol
from dino_jax.eval.published import ARCHITECTURES, architecture, table
from dino_jax.eval.splits import CLASSES
from dino_jax.models import BACKBONES


def model(**values):
    config = default().model
    config.update(values)
    return config


def test_tables_put_the_published_figure_beside_ours():
    lines = table("knn", protocol.get("knn"), {"top1_k20": 74.44444, "top1_k10": 74.0}, "S/16").splitlines()
    assert lines[0].split() == ["knn", "here", "published", "(S/16)"]
    assert lines[1].split() == ["top1_k20", "74.44", "74.5"] and lines[2].split() == ["top1_k10", "74.00"]
    assert lines[-1] == "  published: ImageNet; the official README"
    assert "published" not in table("knn", protocol.get("knn"), {"top1_k20": 1.0}, None)
    absent = table("voc", protocol.get("voc"), {"jaccard_60": 44.0}, "S/16").splitlines()  # not computed: shown too
    assert absent[2].split() == ["jaccard_60_random", "22.0"]


def test_a_protocol_without_published_figures_has_a_table_too():
    plain = Protocol(run=lambda *_: {}, keys={}, data=CLASSES)
    assert table("new", plain, {"figure": 1.5}, "S/16").split() == ["new", "here", "figure", "1.50"]


@pytest.mark.parametrize("name", protocol.names())
def test_published_figures_are_of_known_architectures_and_have_a_source(name):
    record = protocol.get(name)
    assert bool(record.published) == bool(record.source)
    for figures in record.published.values():
        assert set(figures) <= set(ARCHITECTURES)


def test_architectures_are_the_backbones_as_the_registry_has_them():
    for name, (registered, patch) in ARCHITECTURES.items():
        assert registered in BACKBONES
        assert architecture(model(name=registered, patch_size=patch or 16)) == name
    assert architecture(model(dtype="bfloat16", drop_path=0.3)) == "S/16"
    for other in ({"patch_size": 14}, {"embed_dim": 192}, {"in_chans": 4}, {"name": "vit_tiny"}):
        assert architecture(model(**other)) is None
    assert architecture(model(name="resnet50", small_stem=True)) is None
