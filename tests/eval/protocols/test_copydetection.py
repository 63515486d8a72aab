from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from dino_jax.errors import UserError
from dino_jax.eval.protocols import copydetection


@pytest.fixture
def copydays(tmp_path):
    """A miniature Copydays: four originals, two strong and two JPEG copies of each; whitening images."""
    rng = np.random.default_rng(0)

    def image():
        coarse = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((40, 32), Image.Resampling.NEAREST)

    root = tmp_path / "copydays"
    for name in ("original", "strong", "jpegqual/3", "jpegqual/75"):
        (root / name).mkdir(parents=True)
    for i in range(4):
        original = image()
        original.save(root / "original" / f"200{i}00.jpg", quality=95)
        original.save(root / "jpegqual" / "3" / f"200{i}00.jpg", quality=3)
        original.save(root / "jpegqual" / "75" / f"200{i}00.jpg", quality=75)
        original.crop((1, 1, 39, 31)).save(root / "strong" / f"200{i}01.jpg")
        ImageOps.solarize(original, 250).save(root / "strong" / f"200{i}02.jpg")
    (tmp_path / "whitening").mkdir()
    for i in range(6):
        image().save(tmp_path / "whitening" / f"{i}.png")
    return tmp_path


def small():
    config = copydetection.PROTOCOL.default_config()
    config.size, config.batch_size = 32, 4
    return config


def test_protocol(vit, copydays):
    figures = copydetection.evaluate(vit, str(copydays / "copydays"), small())
    assert set(figures) == {"map_original", "map_strong", "map_jpegqual/3", "map_jpegqual/75"}
    assert figures["map_original"] == pytest.approx(100)
    assert figures["map_strong"] > 50


def test_distractors_and_whitening(vit, copydays):
    config = small()
    config.whitening = str(copydays / "whitening")
    config.distractors = str(copydays / "copydays" / "strong")  # copies as distractors: they outrank some originals
    figures = copydetection.evaluate(vit, str(copydays / "copydays"), config)
    assert figures["map_original"] == pytest.approx(100)
    assert figures["map_strong"] < 80


def test_score_by_hand():
    database = np.eye(4)  # two originals, two distractors
    queries = np.array([[0.9, 0.5, 0, 0], [0.1, 0.9, 0, 0.2], [0.5, 0.2, 0.9, 0]])
    score = copydetection.copy_score(database, queries, ["2000", "2001"], ["2000", "2001", "2000"])
    assert score == pytest.approx(100 * (1 + 1 + (0 + 1 / 2) / 2) / 300)


def test_bad_layouts_are_named(vit, copydays, tmp_path):
    with pytest.raises(UserError, match="original"):
        copydetection.evaluate(vit, str(tmp_path / "nothing"), small())
    (copydays / "copydays" / "strong" / "299901.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2999"):
        copydetection.evaluate(vit, str(copydays / "copydays"), small())
    (copydays / "copydays" / "strong" / "299901.jpg").rename(copydays / "copydays" / "strong" / "200109.jpg")
    with pytest.raises(UserError, match=r"200109\.jpg"):
        copydetection.evaluate(vit, str(copydays / "copydays"), small())
