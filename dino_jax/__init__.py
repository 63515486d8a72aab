"""DINO (self-distillation with no labels) and its family for JAX.

    import dino_jax
    model = dino_jax.load("dino_vits16")        # features of your own images: see `dino_jax.inference`
    config = dino_jax.load_config("vit_s16")    # a file, or a name of `configs/`; `dino_jax.config` has every key
    dino_jax.train(config, "runs/1")            # a training run: see `dino_jax.training`

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_jax import config, show
    from dino_jax.config_io import load as load_config
    from dino_jax.inference.model import load
    from dino_jax.training.loop import train

__version__ = "0.1.0"
__all__ = ["__version__", "config", "load", "load_config", "show", "train"]

_HOMES = {
    "config": "dino_jax.config:",
    "load": "dino_jax.inference.model:load",
    "load_config": "dino_jax.config_io:load",
    "show": "dino_jax.show:",
    "train": "dino_jax.training.loop:train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pkgutil

    return pkgutil.resolve_name(_HOMES[name])


def __dir__() -> list[str]:
    return sorted(__all__)
