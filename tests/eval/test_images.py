from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval import images as images


@pytest.mark.extra
def test_linear_resize_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(37, 53, 3)).astype(np.float32)
    tensor = torch.tensor(np.moveaxis(pixels, -1, 0)[None])
    for scale in (2**-0.5, 0.5, 2.0):
        wanted = torch.nn.functional.interpolate(tensor, scale_factor=scale, mode="bilinear", align_corners=False)
        wanted = np.moveaxis(wanted[0].numpy(), 0, -1)
        np.testing.assert_allclose(images.linear_resize(pixels, *wanted.shape[:2], 1 / scale), wanted, atol=1e-3)
    wanted = torch.nn.functional.interpolate(tensor, size=(20, 99), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(images.linear_resize(pixels, 20, 99), np.moveaxis(wanted[0].numpy(), 0, -1), atol=1e-3)


@pytest.mark.extra
def test_linear_resize_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(1).integers(256, size=(64, 101, 3), dtype=np.uint8)
    for height, width in ((48, 64), (100, 128)):
        wanted = cv2.resize(pixels, (width, height)).astype(int)
        assert np.abs(np.rint(images.linear_resize(pixels, height, width)) - wanted).max() <= 1


def test_linear_matrix_keeps_constants():
    for old, new in ((5, 17), (17, 5), (1, 4), (4, 1)):
        np.testing.assert_allclose(images.linear_matrix(old, new).sum(1), 1)


def test_parallel_keeps_the_order_and_passes_errors_on():
    def slow(x):
        time.sleep(0.01 * (x % 3))
        if x == 30:
            raise UserError("thirty")
        return x

    assert list(images.parallel(slow, range(25))) == list(range(25))
    with pytest.raises(UserError, match="thirty"):
        list(images.parallel(slow, range(40)))


def test_batches_hold_one_size_each_and_every_image_once():
    sizes = [(4, 6), (4, 6), (5, 6), (4, 6), (5, 6)]
    batches = list(images.batches_by_size([np.full((*s, 3), i) for i, s in enumerate(sizes)], 2))
    assert sorted(np.concatenate([b["index"] for b in batches])) == list(range(5))
    for batch in batches:
        assert len(batch["index"]) <= 2
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])


def test_broken_and_absent_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "colour.png")
    for read in (images.read_image, images.read_labels):
        with pytest.raises(UserError, match=r"broken\.png: cannot be read"):
            read(tmp_path / "broken.png")
        with pytest.raises(UserError, match=r"absent\.png: no such file"):
            read(tmp_path / "absent.png")
    with pytest.raises(UserError, match="indexed or gray"):
        images.read_labels(tmp_path / "colour.png")
    with pytest.raises(UserError, match="no such folder"):
        images.list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        images.list_images(tmp_path / "empty")


def test_labels_are_raw_numbers(tmp_path):
    labels = np.array([[0, 1], [200, 255]], np.uint8)
    image = Image.fromarray(labels)
    image.putpalette(np.random.default_rng(0).integers(256, size=768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(images.read_labels(tmp_path / "mask.png"), labels)
