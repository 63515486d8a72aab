"""DINO (self-distillation with no labels) for JAX.

    import dino_jax
    model = dino_jax.load("dino_vits16")     # features in five lines: see dino_jax.features

Training is `dino_jax.train.train(config, workdir)`, the configuration `dino_jax.config.default()`. Nothing heavy is
imported before it is used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from dino_jax.features import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
