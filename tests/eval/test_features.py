from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.eval import features


class Tiny(nn.Module):
    """A stand-in backbone: one linear map of the mean colour, and tokens that tell their block and place."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(5, name="out")(images.mean((1, 2)))

    def tokens(self, images, n=1):
        return jnp.stack([images.reshape(len(images), -1, 3) + block for block in range(n)])


@pytest.fixture(scope="module")
def model():
    backbone = Tiny()
    return features.Frozen(backbone, backbone.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))))


def batches(images, size):
    labels = np.arange(len(images))
    return [{"image": images[i : i + size], "label": labels[i : i + size]} for i in range(0, len(images), size)]


def test_extract_equals_a_plain_forward_and_drops_the_filling(model):
    images = np.random.default_rng(0).integers(256, size=(21, 4, 4, 3), dtype=np.uint8)
    got, labels = features.extract(model, batches(images, 9))
    normal = (images / 255 - np.array(model.mean)) / np.array(model.std)
    kernel = model.variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(got, normal.mean((1, 2)) @ np.asarray(kernel), atol=1e-5)
    np.testing.assert_array_equal(labels, np.arange(21))
    one, _ = features.extract(model, batches(images, 5), devices=jax.devices()[:1])
    np.testing.assert_allclose(got, one, atol=1e-6)


def test_progress_counts_pictures_and_an_empty_set_is_an_error(model):
    seen = []
    features.extract(model, batches(np.zeros((7, 4, 4, 3), np.uint8), 4), progress=seen.append)
    assert seen == [4, 7]
    with pytest.raises(UserError, match="--data"):
        features.extract(model, [])


def test_pooling_order():
    tokens = jnp.arange(2 * 1 * 3 * 2.0).reshape(2, 1, 3, 2)  # n=2, B=1, N=3, D=2
    np.testing.assert_array_equal(features.pool_tokens(tokens, False), [[0, 1, 6, 7]])
    np.testing.assert_array_equal(features.pool_tokens(tokens[1:], True), [[6, 9, 7, 10]])
    np.testing.assert_array_equal(features.pool_tokens(tokens, True), [[0, 1, 6, 7, 9, 10]])
