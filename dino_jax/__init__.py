"""DINO (self-distillation with no labels) and its family for JAX.

    import dino_jax
    model = dino_jax.load("dino_vits16")                 # features of your own images: see `dino_jax.inference`
    dino_jax.train(dino_jax.config.default(), "runs/1")  # a training run: see `dino_jax.training`

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_jax import config, show
    from dino_jax.inference.model import load
    from dino_jax.training.loop import train

__version__ = "0.1.0"
__all__ = ["__version__", "config", "load", "show", "train"]

_HOMES = {"load": "dino_jax.inference.model", "train": "dino_jax.training.loop"}  # of functions
_MODULES = ("config", "show")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dino_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
