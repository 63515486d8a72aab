"""Packing of images of any size: how much padding, and what happens to the pixels beyond whole patches."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.inference.model import Model
from dino_jax.models.packing import round_up
from dino_jax.models.positions import resize_matrix
from dino_jax.weights import architecture
from tests.peers import peer


def test_padding_is_at_most_a_quarter():
    padded = [round_up(count) for count in range(1, 5000)]
    assert all(count <= length <= 1.25 * count for count, length in enumerate(padded, 1))
    assert len(set(padded)) < 50


@pytest.fixture(scope="module")
def model():
    """A ViT of one block whose own grid is 4 x 4 patches of 8."""
    config, rng = default(), np.random.default_rng(0)
    config.model.update({"name": "vit_tiny", "embed_dim": 24, "depth": 1, "heads": 3, "patch_size": 8})
    config.crops.global_size = (32, 32)
    shapes = architecture.backbone_shapes(config)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return Model(config, variables, devices=jax.devices()[:1])


def with_table(model, table):
    """Features of an image of 32 x 32 pixels by the plain forward pass, with another position table [1, 17, D]."""
    params = model.variables["params"] | {"pos_embed": np.asarray(table, np.float32)}
    return lambda image: np.asarray(model.backbone.apply({"params": params}, image[None, :32, :32]))[0]


def by_matrices(table):
    matrix = resize_matrix(4, 4)
    patches = np.einsum("ir,jc,rcd->ijd", matrix, matrix, table[0, 1:].astype(np.float64).reshape(4, 4, -1))
    return np.concatenate([table[:, :1], patches.reshape(1, 16, -1)], axis=1)


def by_torch(table):
    """The official `interpolate_pos_encoding`: a scale of (4 + 0.1) / 4 for a grid of 4."""
    torch = peer("torch")
    patches = torch.from_numpy(table[:, 1:].reshape(1, 4, 4, -1)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, scale_factor=(4.1 / 4, 4.1 / 4), mode="bicubic")
    return np.concatenate([table[:, :1], resized.permute(0, 2, 3, 1).reshape(1, 16, -1).numpy()], axis=1)


@pytest.mark.parametrize("resized", [by_matrices, pytest.param(by_torch, marks=pytest.mark.extra)])
def test_pixels_decide_whether_the_position_table_is_resized(model, resized):
    """As in the official model: 32 x 38 has the table's own grid and is resized, since it is not square."""
    rng, table = np.random.default_rng(1), model.variables["params"]["pos_embed"]
    sizes = {(32, 32): False, (37, 37): False, (32, 38): True, (39, 33): True}
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in sizes]
    found = model.features(images)
    for image, feature, is_resized in zip(images, found, sizes.values(), strict=True):
        own, other = (with_table(model, x)(image) for x in (table, resized(table)))
        np.testing.assert_allclose(feature, other if is_resized else own, atol=1e-5)
        assert np.abs(own - other).max() > 5e-4
