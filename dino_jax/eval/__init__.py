"""The paper's evaluations, a module per protocol.

Every module of `PROTOCOLS` has `default_config()`, its keys with their defaults, and
`evaluate(model, data, config, workdir=None) -> dict` of figures, where `model` is a `features.Frozen`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from dino_jax.errors import UserError, did_you_mean

PROTOCOLS = ("knn", "linear", "lowshot", "finetune", "retrieval", "copydetection", "vos", "voc", "dense")


def protocol(name: str) -> ModuleType:
    """The module of a protocol. Raises `UserError` for an unknown name."""
    if name not in PROTOCOLS:
        known = f"one of {', '.join(PROTOCOLS)}, all"
        raise UserError(f"unknown protocol {name!r} ({known}){did_you_mean(name, PROTOCOLS)}")
    return importlib.import_module(f"dino_jax.eval.protocols.{name}")
