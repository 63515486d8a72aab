"""A configuration and crops small enough to train in a test."""

from __future__ import annotations

import numpy as np

from dino_jax.config import ConfigDict, default


def tiny_config(**model) -> ConfigDict:
    """Depth 2, width 32, 16 images of `scenes` a step, 4 steps an epoch, 3 epochs."""
    config = default()
    config.epochs, config.batch_size = 3, 16
    config.data.train = "scenes:train?size=64&image_size=32"
    config.model.update({"name": "vit_tiny", "patch_size": 8, "embed_dim": 32, "depth": 2, "heads": 2, **model})
    config.head.update({"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16})
    config.crops.update({"global_size": (32, 32), "local_size": (16, 16), "local_count": 2})
    config.optim.warmup_epochs = 1
    config.run.update({"log_every": 1, "progress": False, "tensorboard": False, "async_checkpoint": False})
    return config


def random_crops(config: ConfigDict, seed: int = 0, dtype=np.float32) -> list[np.ndarray]:
    """Crops as the train step takes them: [B, 2, H, W, c] and [B, n, h, w, c], unit normal."""
    rng = np.random.default_rng(seed)
    shapes = [(2, *config.crops.global_size), (config.crops.local_count, *config.crops.local_size)]
    return [rng.standard_normal((config.batch_size, *shape, config.model.in_chans)).astype(dtype) for shape in shapes]
