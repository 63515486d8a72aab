from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.eval import augment


@pytest.fixture
def image():
    rows, columns = np.mgrid[:16, :24]
    planes = [12 * rows + 3 * columns, 250 - 9 * columns, 40 + 4 * rows + 5 * columns]  # gradients: all pixels differ
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_keep_the_form_and_grow_with_the_strength(name, image):
    changed = []
    for share in (0.0, 0.5, 1.0):
        out = augment.OPERATIONS[name](image, share, 1.0, Image.Resampling.BILINEAR)
        assert out.size == image.size and out.mode == "RGB"
        changed.append(np.mean(np.abs(np.asarray(out).astype(int) - np.asarray(image))))
    if name not in ("autocontrast", "equalize", "invert", "posterize", "sharpness"):  # gradients have no edges
        assert changed[0] == 0 and changed[0] < changed[1] < changed[2]


def test_known_strengths(image):
    pixels = np.asarray(image).astype(int)
    apply = lambda name, share: np.asarray(  # noqa: E731
        augment.OPERATIONS[name](image, share, 1.0, Image.Resampling.NEAREST)
    ).astype(int)
    np.testing.assert_array_equal(apply("solarize", 0.5), np.where(pixels < 128, pixels, 255 - pixels))
    np.testing.assert_array_equal(apply("solarize_add", 0.5), np.where(pixels < 128, pixels + 55, pixels))
    np.testing.assert_array_equal(apply("posterize", 0.5), pixels & 0b11000000)
    moved = apply("translate_x", 0.5)  # 0.45 * 0.5 * 24 = 5.4 pixels
    np.testing.assert_array_equal(moved[:, :18], pixels[:, 5:23])
    np.testing.assert_array_equal(moved[:, -1], np.broadcast_to(augment.GRAY, (16, 3)))


def test_rand_augment_is_seeded_and_leaves_other_channels_alone():
    pixels = np.random.default_rng(1).integers(256, size=(16, 16, 3), dtype=np.uint8)
    draw = lambda seed: augment.rand_augment(pixels, np.random.default_rng(seed), 9.0)  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    outcomes = [draw(seed) for seed in range(40)]
    same = sum(np.array_equal(out, pixels) for out in outcomes)
    assert 3 <= same <= 20  # a quarter of the draws apply neither operation
    five = np.zeros((4, 4, 5), np.uint8)
    assert augment.rand_augment(five, np.random.default_rng(0), 9.0) is five


def test_mixup_and_cutmix_shares_are_what_is_seen():
    images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 10, 12, 1))
    targets = jnp.eye(4)
    for seed in range(12):
        mix = augment.draw_mix(np.random.default_rng(seed), 10, 12, 0.8, 1.0)
        mixed, soft = jax.jit(augment.mix_batch)(images, targets, jnp.ones(4, bool), mix)
        # the mean of image i mixes its own number and its partner's in the shares of its target
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), soft @ np.arange(4.0), atol=1e-5)
        np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
        if mix.blend == 1:
            assert set(np.unique(mixed[0])) <= {0.0, 3.0}


def test_filling_is_never_mixed_in():
    images, targets = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 4, 4, 1)), jnp.eye(4)
    mix = augment.Mix(np.float32(0.3), np.float32(0.3), np.zeros(4, np.int32))
    mixed, soft = jax.jit(augment.mix_batch)(images, targets, jnp.array([True, True, True, False]), mix)
    np.testing.assert_allclose(mixed[0], 0)
    np.testing.assert_allclose(soft[0], targets[0])
    assert float(mixed[1, 0, 0, 0]) == pytest.approx(0.3 * 1 + 0.7 * 2)


def test_no_mixing_when_both_are_off():
    mix = augment.draw_mix(np.random.default_rng(0), 8, 8, 0.0, 0.0)
    assert mix.share == 1 and mix.blend == 1 and not mix.box.any()


def test_smoothing_by_hand():
    np.testing.assert_allclose(augment.smoothed(jnp.array([1]), 4, 0.1), [[0.025, 0.925, 0.025, 0.025]])


def test_erasing_takes_a_box_of_the_stated_area():
    images = jnp.full((64, 20, 30, 2), 5.0)
    out = np.asarray(jax.jit(augment.erase)(jax.random.key(0), images, 0.5))
    erased = (out != 5).any(-1)
    hit = erased.any((1, 2))
    assert 16 < hit.sum() < 48
    for mask in erased[hit]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.01 < mask.mean() < 0.4
    np.testing.assert_array_equal(jax.jit(augment.erase)(jax.random.key(0), images, 0.0), images)
