from __future__ import annotations

import numpy as np
import pytest

from dino_jax.eval.protocols import voc


def test_masks_keep_the_fewest_patches_that_carry_the_mass():
    attention = np.random.default_rng(0).exponential(size=(2, 3, 40))
    masks = voc.attention_masks(attention, 0.7)
    share = attention / attention.sum(-1, keepdims=True)
    kept = np.sum(share * masks, -1)
    smallest = np.where(masks, share, np.inf).min(-1)
    assert np.all(kept >= 0.7) and np.all(kept - smallest < 0.7)
    assert np.all(smallest >= np.where(masks, -np.inf, share).max(-1))


def test_jaccard_by_hand():
    left, top = np.zeros((2, 4, 4), bool)
    left[:, :2] = True
    top[:2] = True
    assert voc.jaccard(left, top) == 4 / 12
    assert voc.jaccard(left, left) == 1
    assert voc.jaccard(left, ~left) == 0
    assert voc.jaccard(left & ~left, left & ~left) == 0


def test_best_head_counts_for_each_object():
    objects = np.zeros((4, 6), int)
    objects[:, :2], objects[:, 4:], objects[:, 3] = 1, 7, 255
    heads = np.stack([objects == 1, np.ones_like(objects, bool)])  # the second covers 24 pixels, 8 of them object 7
    assert voc.image_jaccard(heads, objects) == pytest.approx((1 + 8 / 24) / 2)
    assert np.isnan(voc.image_jaccard(heads, np.full((4, 6), 255)))


def test_enlarged_masks_repeat_their_patches():
    masks = np.random.default_rng(1).random((2, 3, 5)) > 0.5
    np.testing.assert_array_equal(voc.enlarge(masks, 12, 20), np.kron(masks, np.ones((1, 4, 4), bool)))
    assert voc.enlarge(masks, 13, 7).shape == (2, 13, 7)
