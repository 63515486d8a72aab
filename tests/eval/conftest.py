"""A tiny frozen backbone and miniature data sets for every protocol's tests."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default
from dino_jax.inference.model import Model
from dino_jax.weights import architecture

COLORS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


@pytest.fixture(scope="session")
def vit():
    """A ViT with two blocks, width 16, patch 4, and random weights large enough for features to differ."""
    return tiny_model()


def tiny_model(**changes) -> Model:
    """That ViT, or a variant with other `config.model` keys."""
    config, rng = default(), np.random.default_rng(0)
    config.model.update({"name": "vit_tiny", "embed_dim": 16, "depth": 2, "heads": 2, "patch_size": 4, **changes})
    config.crops.global_size = (16, 16)
    shapes = architecture.backbone_shapes(config)
    return Model(config, jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.1, x.shape).astype(np.float32), shapes))


@pytest.fixture
def class_folders(tmp_path):
    """`train` (8 per class) and `val` (4 per class) as class folders; each class is a color with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, color in zip(("n01", "n02", "n03"), COLORS, strict=True):
            folder = tmp_path / "classes" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 30, (18, 22, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
    return tmp_path / "classes"
