from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval.draw import palette
from dino_jax.eval.protocols import vos
from tests.eval.conftest import COLORS


@pytest.fixture
def davis_folder(tmp_path):
    """A miniature DAVIS 2017: two videos of four frames, two squares moving on gray."""
    rng = np.random.default_rng(0)
    for name in ("bear", "dog"):
        frames, masks = (tmp_path / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(4):
            labels = np.zeros((34, 50), np.uint8)
            labels[3 + t : 17 + t, 4 + t : 18 + t], labels[16:32, 30 - t : 46 - t] = 1, 2
            pixels = np.array([(128, 128, 128), *COLORS[:2]])[labels] + rng.normal(0, 6, (34, 50, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(frames / f"{t:05d}.jpg", quality=95)
            image = Image.fromarray(labels)
            image.putpalette(palette().tobytes())
            image.save(masks / f"{t:05d}.png")
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\ndog\n")
    return tmp_path


def small():
    config = vos.PROTOCOL.default_config()
    config.size, config.multiple, config.context, config.radius, config.batch_size = 32, 8, 2, 2, 3
    return config


def test_protocol_writes_indexed_images_and_resumes_by_video(vit, davis_folder, tmp_path, monkeypatch):
    figures = vos.evaluate(vit, str(davis_folder), small(), workdir=str(tmp_path / "work"))
    assert set(figures) == {"J&F_mean", *(f"{m}_{s}" for m in "JF" for s in ("mean", "recall", "decay"))}
    assert figures["J_mean"] > 60
    (folder,) = (tmp_path / "work").glob("vos-*")
    with Image.open(folder / "dog" / "00002.png") as image:
        assert image.mode == "P" and image.size == (50, 34)
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert set(json.loads((folder / "objects.json").read_text())) == {"bear_1", "bear_2", "dog_1", "dog_2"}
    with Image.open(folder / "bear" / "00000.png") as written:  # the first frame is the annotation itself
        truth = vos.read_labels(davis_folder / "Annotations" / "480p" / "bear" / "00000.png")
        np.testing.assert_array_equal(np.asarray(written), truth)
    assert Image.open(tmp_path / "work" / "vos.png").height == 2 * 204 + 4
    seen = []
    segment = vos.segment
    monkeypatch.setattr(vos, "segment", lambda m, video, *rest: seen.append(video.name) or segment(m, video, *rest))
    for file in (folder / "dog").iterdir():
        file.unlink()
    (folder / "dog").rmdir()
    assert vos.evaluate(vit, str(davis_folder), small(), workdir=str(tmp_path / "work")) == figures
    assert seen == ["dog"]


def test_a_still_video_keeps_its_labels(vit):
    rng = np.random.default_rng(1)
    pixels = rng.integers(256, size=(32, 48, 3), dtype=np.uint8)
    labels = np.kron(rng.integers(3, size=(8, 12)).astype(np.uint8), np.ones((4, 4), np.uint8))
    video = vos.Video("still", ["a", "b", "c"], lambda t: pixels, lambda: None)
    config = small()
    config.topk = 1
    got = vos.segment(vit, video, labels, config)
    agree = np.mean(got[1:] == labels)
    assert agree > 0.75  # bilinear upsampling rounds off the corners of single patches


def test_frame_sizes():
    assert vos.frame_size(480, 854, 480, 64) == (480, 832)
    assert vos.frame_size(854, 480, 480, 64) == (832, 480)
    assert vos.frame_size(100, 100, 480, 64) == (480, 448)


def test_scenes_are_videos_too():
    videos = list(vos.open_videos("scenes:val?size=2&image_size=32", "val"))
    assert [len(v.stems) for v in videos] == [12, 12]
    assert videos[0].frame(3).shape == (32, 32, 3) and videos[0].truth().max() == 3


def test_bad_layouts_are_named(vit, davis_folder, tmp_path):
    with pytest.raises(UserError, match=r"val\.txt: no such file"):
        vos.evaluate(vit, str(tmp_path / "nowhere"), small())
    config = small()
    config.multiple, config.size = 1, 33
    with pytest.raises(UserError, match="patches of 4"):
        vos.evaluate(vit, str(davis_folder), config)
    config.multiple, config.size = 64, 32  # the longer side would be rounded down to nothing
    with pytest.raises(UserError, match=r"frames of 32 x 0 .* --config\.multiple"):
        vos.evaluate(vit, str(davis_folder), config)
    (davis_folder / "Annotations" / "480p" / "bear" / "00002.png").unlink()
    with pytest.raises(UserError, match=r"00002\.png: no such file"):
        vos.evaluate(vit, str(davis_folder), small())
    (davis_folder / "ImageSets" / "2017" / "val.txt").write_text("cat\n")
    with pytest.raises(UserError, match="cat: no such folder"):
        vos.evaluate(vit, str(davis_folder), small())
