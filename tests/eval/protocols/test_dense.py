from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval.masks import Masked, MaskedImages
from dino_jax.eval.protocols import dense
from dino_jax.parallel.sharding import make_mesh


def small():
    config = dense.PROTOCOL.default_config()
    config.size, config.epochs, config.batch_size, config.lr, config.threads = 32, 12, 8, 0.1, 2
    return config


def colored_squares(count, seed):
    """Images of a red and a green square on gray: classes that a linear head can tell by color."""

    def load(i):
        rng = np.random.default_rng((seed, i))
        classes = np.zeros((36, 40), np.uint8)
        for label, left in ((1, 2), (2, 22)):
            top = int(rng.integers(2, 16))
            classes[top : top + 16, left : left + 16] = label
        colors = np.array([(120, 120, 120), (220, 40, 40), (40, 200, 60)])
        pixels = np.clip(colors[classes] + rng.normal(0, 8, (36, 40, 3)), 0, 255).astype(np.uint8)
        classes[0] = 255
        return Masked(pixels, classes, classes)

    return MaskedImages(count, load, 3)


def test_a_linear_head_learns_colors(vit):
    config = small()
    head = dense.fit(vit, colored_squares(20, 0), 3, config)
    figures = dense.iou_scores(dense.confusion(vit, head, colored_squares(5, 1), 3, config))
    assert figures["miou"] > 50 and figures["pixel_accuracy"] > 70


def test_one_device_equals_eight(vit, monkeypatch):
    config = small()
    config.epochs, config.batch_size, config.lr = 1, 5, 1e-3
    heads = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1}, devices)
        monkeypatch.setattr(dense, "data_mesh", lambda mesh=mesh: mesh)
        monkeypatch.setattr(dense, "rounded", lambda size, mesh: 8)  # the same batches: padding does not count
        heads.append(jax.device_get(dense.fit(vit, colored_squares(11, 0), 3, config)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *heads)


def test_protocol_on_scenes(vit, tmp_path):
    config = small()
    config.epochs, config.batch_size = 1, 16
    pair = "scenes:train?size=12&image_size=32,scenes:val?size=5&image_size=32"
    figures = dense.evaluate(vit, pair, config, workdir=str(tmp_path))
    assert 0 < figures["miou"] < 100
    with Image.open(tmp_path / "dense.png") as image:
        assert image.size == (3 * 164 + 12, 5 * 164 + 4)  # image, truth, prediction of each


def test_protocol_on_folders(vit, tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        images = colored_squares(8, seed)
        for i in range(8):
            masked = images.load(i)
            for part, array in (("images", masked.pixels), ("masks", masked.classes)):
                (tmp_path / split / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / split / part / f"{i}.png")
    config = small()
    config.epochs = 1
    assert set(dense.evaluate(vit, str(tmp_path), config)) == {"miou", "pixel_accuracy"}


def test_masks_without_a_class_or_with_too_many_are_errors(vit):
    head = {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(3)}
    for number, message in ((255, "no labeled pixels"), (7, "class 7")):
        labels = np.full((8, 8), number, np.uint8)
        images = MaskedImages(1, lambda i, x=labels: Masked(np.zeros((8, 8, 3), np.uint8), x, x), 3)
        with pytest.raises(UserError, match=message):
            dense.confusion(vit, head, images, 3, small())


def test_scores_by_hand():
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # class 2 never occurs
    assert dense.iou_scores(counts) == pytest.approx({"miou": 100 * (6 / 9 + 3 / 6) / 2, "pixel_accuracy": 75})


def test_loss_leaves_ignored_pixels_out():
    head = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    tokens = jnp.broadcast_to(jnp.array([2.0, 0, 0]), (1, 2, 2, 3))
    labels = np.full((1, 4, 4), 255, np.uint8)
    labels[0, 0, 0] = 0
    wanted = np.log(np.exp(2) + 2) - 2
    assert float(dense._loss(head, tokens, labels)) == pytest.approx(wanted, rel=1e-5)
