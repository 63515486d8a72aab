"""Compares figures with the paper's and the official repository's.

Protocols list published figures, in percent, by the architecture names below; see `protocol.Protocol.published`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dino_jax.config import default
from dino_jax.errors import printable
from dino_jax.eval.protocol import Protocol

ARCHITECTURES = {  # the paper's name -> model.name, model.patch_size (None: no patches)
    "S/16": ("vit_small", 16),
    "S/8": ("vit_small", 8),
    "B/16": ("vit_base", 16),
    "B/8": ("vit_base", 8),
    "RN50": ("resnet50", None),
    "XCiT-S12/16": ("xcit_small_12", 16),
    "XCiT-S12/8": ("xcit_small_12", 8),
    "XCiT-M24/16": ("xcit_medium_24", 16),
    "XCiT-M24/8": ("xcit_medium_24", 8),
}
# Keys of config.model that do not change the architecture.
_FREE = ("name", "patch_size", "init_std", "drop_path", "dtype", "precision")


def architecture(model: ConfigDict) -> str | None:
    """The paper's name, such as `S/16`, for the backbone in `config.model`; None if the paper does not have it.

    A backbone that overrides the named model, e.g. its width, has no such name.
    """
    if any(model[key] != value for key, value in default().model.items() if key not in _FREE):
        return None
    known = ((name, patch) for name, (registered, patch) in ARCHITECTURES.items() if registered == model.name)
    return next((name for name, patch in known if patch in (None, model.patch_size)), None)


def table(name: str, protocol: Protocol, figures: Mapping[str, Any], architecture: str | None) -> str:
    """Formats a protocol's figures: name, value and, if any, the published value."""
    known = {key: row[architecture] for key, row in protocol.published.items() if architecture and architecture in row}
    lines = [(name, "here", f"published ({architecture})" if known else "")]
    for key, value in figures.items():
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        lines.append((f"  {printable(key)}", shown, f"{known[key]:.1f}" if key in known else ""))
    lines += [(f"  {key}", "", f"{value:.1f}") for key, value in known.items() if key not in figures]
    width = max(len(line[0]) for line in lines)
    text = [f"{first:{width}}  {second:>10}  {third}".rstrip() for first, second, third in lines]
    return "\n".join(text + ([f"  published: {protocol.source}"] if known else []))
