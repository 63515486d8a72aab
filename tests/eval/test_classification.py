"""k-NN and low-shot regression end to end, on class folders."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.eval import draw, features
from dino_jax.eval.protocols import knn, linear, lowshot
from dino_jax.eval.splits import check_labels, in_classes_of, train_test


def small(config):
    config.resize, config.crop, config.batch_size = 16, 16, 8
    return config


def test_knn_protocol(vit, class_folders, tmp_path):
    config = small(knn.PROTOCOL.default_config())
    figures = knn.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "work"))
    assert set(figures) == {"top1_k10", "top1_k20", "top5_k10", "top5_k20"}  # 24 training images: no k=100
    assert figures["top1_k10"] > 80 and figures["top5_k10"] == 100
    assert len(list((tmp_path / "work").glob("features-*.npz"))) == 2
    image = np.asarray(Image.open(tmp_path / "work" / "knn.png"))
    assert image.shape == (6 * 100 + 4, 7 * 100 + 12, 3)  # a query and six neighbors
    frames = image[6::100, 120::100]  # the first rows of the neighbors' frames
    assert {tuple(color) for color in frames.reshape(-1, 3)} <= {draw.GREEN, draw.RED}


def test_lowshot_protocol(vit, class_folders, tmp_path):
    config = small(lowshot.PROTOCOL.default_config())
    config.shares = (0.25, 1.0)
    figures = lowshot.evaluate(vit, str(class_folders), config)
    assert figures["top1_100%"] > 80 and figures["top1_25%"] > 50
    assert figures["gap_25%"] <= config.tolerance
    names = [f"{name}_{i}.JPEG" for name in ("n01", "n02", "n03") for i in (1, 5)]
    (tmp_path / "2_each.txt").write_text("\n".join(names) + "\n")
    config.lists = (str(tmp_path / "2_each.txt"),)
    assert set(lowshot.evaluate(vit, str(class_folders), config)) == {"top1_2_each", "gap_2_each"}


@pytest.mark.parametrize("protocol", [knn, lowshot])
def test_both_sources_are_opened_before_the_long_part(vit, class_folders, protocol, monkeypatch):
    monkeypatch.setattr(features, "extract", lambda *_, **__: pytest.fail("features were computed"))
    for data in (f"{class_folders / 'train'},{class_folders / 'nothing'}", f"absent,{class_folders / 'val'}"):
        with pytest.raises(UserError, match="no such file or folder"):
            protocol.evaluate(vit, data, small(protocol.PROTOCOL.default_config()))


def test_subsets_are_per_class_nested_and_seeded():
    labels = np.repeat([0, 1, 5], [200, 40, 3])
    tenth, hundredth = (lowshot.per_class(labels, share, 0) for share in (0.1, 0.01))
    np.testing.assert_array_equal(np.bincount(labels[tenth]), [20, 4, 0, 0, 0, 1])
    np.testing.assert_array_equal(np.bincount(labels[hundredth]), [2, 1, 0, 0, 0, 1])
    assert set(hundredth) <= set(tenth)
    np.testing.assert_array_equal(tenth, lowshot.per_class(labels, 0.1, 0))
    assert not np.array_equal(tenth, lowshot.per_class(labels, 0.1, 1))
    with pytest.raises(UserError, match="must lie in"):
        lowshot.per_class(labels, 10, 0)


def test_listed_images_keep_the_class_numbers_of_the_folders(class_folders, tmp_path):
    (tmp_path / "list.txt").write_text("n03_2.JPEG\nn01/n01_0.JPEG\n")
    source = lowshot.listed(str(tmp_path / "list.txt"), str(class_folders / "train"))
    assert [source[i].label for i in range(2)] == [2, 0] and source[0].image[:2] == b"\xff\xd8"
    (tmp_path / "list.txt").write_text("n09_2.JPEG\n")
    with pytest.raises(UserError, match="n09"):
        lowshot.listed(str(tmp_path / "list.txt"), str(class_folders / "train"))
    with pytest.raises(UserError, match="absent"):
        lowshot.listed(str(tmp_path / "absent.txt"), str(class_folders / "train"))


@pytest.mark.parametrize("protocol", [knn, lowshot, linear])
def test_classes_are_matched_by_name(vit, class_folders, protocol, tmp_path):
    """Without the folder of the first class in `val`, its other images are as right as before."""
    config = small(protocol.PROTOCOL.default_config())
    config.update({"k": (3,)} if protocol is knn else {"shares": (1.0,)} if protocol is lowshot else {"epochs": 12})
    shutil.rmtree(class_folders / "val" / "n01")
    for split in ("train", "val"):
        (class_folders / split / f"__{split}").mkdir()  # holds no images
    figures = protocol.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "work"))
    assert figures[{knn: "top1_k3", lowshot: "top1_100%", linear: "top1"}[protocol]] > 80
    shutil.copytree(class_folders / "val" / "n02", class_folders / "val" / "n00")
    with pytest.raises(UserError, match="1 test classes have no training images, first class n00"):
        protocol.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "work"))


def test_listed_classes_are_matched_by_name_too(tmp_path):
    def listed(name: str, lines: str) -> Source:
        (tmp_path / name).write_text(lines)
        return open_source(f"list:{tmp_path / name}")

    for file in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    train = listed("train.txt", "a.png\tcat\nb.png\tdog\nc.png\temu\n")
    test = in_classes_of(train, listed("test.txt", "b.png\tdog\nc.png\temu\n"), "x")
    assert [test[i].label for i in range(2)] == [1, 2] and test.class_names == train.class_names
    assert in_classes_of(train, train, "x") is train


def test_splits(class_folders):
    assert train_test(str(class_folders)) == (str(class_folders / "train"), str(class_folders / "val"))
    assert train_test("scenes:train?size=9,scenes:test?size=3") == ("scenes:train?size=9", "scenes:test?size=3")
    with pytest.raises(UserError, match="subfolders train and val"):
        train_test(str(class_folders / "train"))
    assert check_labels(np.array([0, 2]), np.array([2]), "x") == 3
    with pytest.raises(UserError, match="first class 1"):
        check_labels(np.array([0, 2]), np.array([1]), "x")
    with pytest.raises(UserError, match="no labels"):
        check_labels(np.array([0, 2]), np.array([-1]), "x")
