"""A tiny frozen backbone and miniature data sets that every protocol's test can use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.eval.features import Frozen
from dino_jax.models import ViT

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


@pytest.fixture(scope="session")
def vit():
    """A ViT of two blocks, width 16, patch 4, with random weights large enough for features to differ."""
    backbone = ViT(embed_dim=16, depth=2, heads=2, patch_size=4, image_size=(16, 16))
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    return Frozen(backbone, jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.1, x.shape).astype(np.float32), shapes))


@pytest.fixture
def class_folders(tmp_path):
    """`train` (8 a class) and `val` (4 a class) in ImageNet's form: class folders of noisy pictures of one colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in zip(("n01", "n02", "n03"), COLOURS, strict=True):
            folder = tmp_path / "classes" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 30, (18, 22, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
    return tmp_path / "classes"
