"""Shapes and types of calls, checked while the tests run: jaxtyping's import hook with beartype.

Every annotation in the modules of array functions is checked, in the test process itself. Modules that pass whole
training states or model records are not: their fields hold arrays, shapes or shardings by turns.
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
_CONF = BeartypeConf(is_pep484_tower=True)  # accepts an int as a float


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked against its annotations."""
    return beartype(function, conf=_CONF)


def install() -> None:
    """Checks `MODULES` from now on; call it before they are imported."""
    jaxtyping.install_import_hook(list(MODULES), f"{__name__}.check")
