"""The paper's evaluations, a module per protocol.

Every module of `PROTOCOLS` has `default_config()`, its keys with their defaults, and
`evaluate(model, data, config, workdir=None) -> dict` of figures, where `model` is a `inference.model.Model`.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from dino_jax.errors import UserError

PROTOCOLS = ("knn", "linear", "lowshot", "finetune", "retrieval", "copydetection", "vos", "voc", "dense")


def protocol(name: str) -> ModuleType:
    """The module of a protocol. Raises `UserError` for an unknown name."""
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown protocol {name!r}{hint} (one of {', '.join(PROTOCOLS)}, all)")
    return importlib.import_module(f"dino_jax.eval.protocols.{name}")
