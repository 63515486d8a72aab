from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval.draw import palette
from dino_jax.eval.masks import open_masks, train_test_masks
from dino_jax.eval.protocols import dense, voc
from dino_jax.weights.keys import VIT, key_table, to_torch
from dino_jax.weights.pth import write_pth


def save_mask(path, labels):
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def voc_folder(tmp_path):
    """A miniature VOC12: five images, two objects each with a void border, two splits."""
    rng = np.random.default_rng(0)
    root = tmp_path / "VOCdevkit" / "VOC2012"
    classes = np.array([0, 15, 7, 255], np.uint8)
    names = [f"2007_{i:06d}" for i in range(5)]
    (root / "JPEGImages").mkdir(parents=True)
    for name in names:
        objects = np.zeros((24, 32), np.uint8)
        objects[2:14, 3:13], objects[8:22, 18:30] = 1, 2
        objects[1, :] = 255
        pixels = np.where(objects[..., None] == 1, (200, 30, 30), np.where(objects[..., None] == 2, (30, 200, 30), 90))
        pixels = np.clip(pixels + rng.normal(0, 10, (24, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        save_mask(root / "SegmentationObject" / f"{name}.png", objects)
        save_mask(root / "SegmentationClass" / f"{name}.png", classes[np.minimum(objects, 3)])
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(names[:3]) + "\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names[3:]) + "\n")
    return tmp_path


def test_voc_layout(voc_folder):
    train, val = train_test_masks(str(voc_folder))
    assert (train.size, val.size, train.num_classes) == (3, 2, 21)
    masked = val.load(1)
    assert set(np.unique(masked.objects)) == {0, 1, 2, 255} and set(np.unique(masked.classes)) == {0, 7, 15, 255}
    assert masked.pixels.shape == (24, 32, 3)


def test_scenes_and_folders(tmp_path):
    scenes = open_masks("scenes:val?size=4&image_size=32", "val")
    masked = scenes.load(2)
    assert scenes.size == 4 and scenes.num_classes == 13
    assert set(np.unique(masked.objects)) == {0, 1} and masked.classes.max() >= 1
    (tmp_path / "images").mkdir()
    Image.fromarray(masked.pixels).save(tmp_path / "images" / "a.png")
    save_mask(tmp_path / "masks" / "a.png", masked.objects * np.uint8(255))  # binary
    folder = open_masks(str(tmp_path), "val")
    np.testing.assert_array_equal(folder.load(0).objects, masked.objects)
    np.testing.assert_array_equal(folder.load(0).pixels, masked.pixels)


def test_bad_layouts_are_named(voc_folder, tmp_path):
    root = voc_folder / "VOCdevkit" / "VOC2012"
    with pytest.raises(UserError, match="neither a VOC folder"):
        open_masks(str(tmp_path / "nowhere"), "val")
    with pytest.raises(UserError, match=r"test\.txt: no such file"):
        open_masks(str(voc_folder), "test")
    (root / "SegmentationObject" / "2007_000003.png").unlink()
    with pytest.raises(UserError, match=r"2007_000003\.png: no such file"):
        open_masks(str(voc_folder), "val").load(0)
    save_mask(root / "SegmentationObject" / "2007_000003.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(UserError, match="2007_000003: mask of"):
        open_masks(str(voc_folder), "val").load(0)
    (tmp_path / "f" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "f" / "images" / "a.png")
    save_mask(tmp_path / "f" / "masks" / "b.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"a\.png: no mask"):
        open_masks(str(tmp_path / "f"), "val")


def test_voc_protocol(vit, voc_folder, tmp_path):
    config = voc.PROTOCOL.default_config()
    config.size, config.batch_size, config.random = 32, 2, True
    figures = voc.evaluate(vit, str(voc_folder), config, workdir=str(tmp_path / "work"))
    assert set(figures) == {"jaccard_60", "jaccard_80", "jaccard_60_random", "jaccard_80_random"}
    assert all(0 < value < 100 for value in figures.values())
    with Image.open(tmp_path / "work" / "voc.png") as image:
        assert image.size == (3 * 164 + 12, 2 * 164 + 4)


def test_the_supervised_reference_is_a_weight_file_of_the_same_network(vit, voc_folder, tmp_path):
    model, config = (
        dataclasses.replace(vit, variables={"params": vit.variables["params"]}),
        voc.PROTOCOL.default_config(),
    )
    config.size, config.batch_size = 32, 2
    other = jax.tree.map(lambda x: -x, model.variables)
    wanted = voc.evaluate(dataclasses.replace(model, variables=other), str(voc_folder), config)
    write_pth(tmp_path / "deit.pth", {"model": to_torch(key_table(other, VIT), other)})
    config.supervised = str(tmp_path / "deit.pth")
    figures = voc.evaluate(model, str(voc_folder), config)
    assert figures["jaccard_60_supervised"] == wanted["jaccard_60"] != figures["jaccard_60"]
    shallow = {"params": {key: value for key, value in other["params"].items() if key != "blocks_1"}}
    write_pth(tmp_path / "deit.pth", to_torch(key_table(shallow, VIT), other))
    with pytest.raises(UserError, match="not weights of the same network"):
        voc.evaluate(model, str(voc_folder), config)


def test_an_attention_that_follows_the_object_scores_full(vit, voc_folder, monkeypatch):
    config = voc.PROTOCOL.default_config()
    config.size, config.batch_size = 32, 1

    def perfect(model, view, batches):
        for batch in batches:
            objects = batch["masked"][0].objects
            heads = np.stack([objects == 1, objects == 2, objects == 0]) + 1e-9
            yield heads[None], batch

    monkeypatch.setattr(voc, "run", perfect)
    config.masses = (0.999,)
    assert voc.evaluate(vit, str(voc_folder), config)["jaccard_100"] > 98


@pytest.mark.parametrize("protocol", [voc, dense])
def test_a_size_below_a_patch_is_named(vit, voc_folder, protocol):
    config = protocol.PROTOCOL.default_config()
    config.size = 3
    with pytest.raises(UserError, match=r"config\.size=3 is smaller than a patch of 4"):
        protocol.evaluate(vit, str(voc_folder), config)


def test_masks_without_objects_are_an_error(vit, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    save_mask(tmp_path / "masks" / "a.png", np.zeros((16, 16), np.uint8))
    config = voc.PROTOCOL.default_config()
    config.size = 16
    with pytest.raises(UserError, match="no mask has an object"):
        voc.evaluate(vit, str(tmp_path), config)
