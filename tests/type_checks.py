"""Shapes and types of calls, checked while the tests run: jaxtyping's import hook with beartype.

The modules of array functions are checked, their every annotation, in the test process itself. Not those that move
whole training states or model records about: their fields hold arrays, shapes or shardings by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

MODULES = (
    "dino_jax.eval.davis",
    "dino_jax.eval.logistic",
    "dino_jax.eval.propagation",
    "dino_jax.eval.ranking",
    "dino_jax.models",
    "dino_jax.objectives",
    "dino_jax.render",
    "dino_jax.training.optim",
    "dino_jax.training.schedules",
    "dino_jax.training.teacher",
)
_CONF = BeartypeConf(is_pep484_tower=True)  # an int where a float is asked for is right


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked against its annotations."""
    return beartype(function, conf=_CONF)


def install() -> None:
    """Checks `MODULES` from now on; to be called before they are imported."""
    jaxtyping.install_import_hook(list(MODULES), f"{__name__}.check")
