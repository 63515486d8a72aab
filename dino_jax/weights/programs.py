"""Exports a backbone with its weights as a program: StableHLO by `jax.export`, ONNX by jax2onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dino_jax.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(
    backbone: nn.Module, variables: Any, *, channels: int, image_size: tuple[int, int], attention: bool
) -> bytes:
    """A serialized `jax.export.Exported` for cpu, cuda and tpu; `jax.export.deserialize(bytes).call(images)` runs it.

    Input: normalized float32 images [B, h, w, c], any B. Output: features [B, D]; with `attention` also the last
    block's attention [B, H, N, N], tokens in the order CLS, registers, patches.
    """
    _require("flatbuffers")
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_size, channels), jnp.float32)
    exported = jax.export.export(jax.jit(_forward(backbone, variables, attention)), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def onnx(backbone: nn.Module, variables: Any, *, channels: int, image_size: tuple[int, int], attention: bool) -> bytes:
    """An ONNX model. Input `images`: normalized float32 [B, c, h, w], the ONNX convention, any B.

    Outputs: `features` [B, D]; with `attention` also the last block's `attention` [B, H, N, N].
    """
    for module in ("onnx", "jax2onnx"):
        _require(module)
    forward = _forward(backbone, variables, attention)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about missing example libraries, and constant shapes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from jax2onnx import to_onnx

            model = to_onnx(
                lambda images: forward(jnp.transpose(images, (0, 2, 3, 1))),
                [("B", channels, *image_size)],
                model_name="dino",
            )
    finally:
        logging.disable(level)
    _rename(model, ["images"], ["features", "attention"][: 1 + attention])
    return model.SerializeToString()


def _forward(backbone: nn.Module, variables: Any, attention: bool) -> Callable[[jax.Array], Any]:
    def forward(images: jax.Array) -> Any:
        features = backbone.apply(variables, images)
        return (features, backbone.apply(variables, images, method="attention")) if attention else features

    return forward


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Renames an ONNX model's inputs and outputs everywhere."""
    values = [*model.graph.input, *model.graph.output]
    names = {value.name: name for value, name in zip(values, inputs + outputs, strict=True)}
    for value in values:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _require(module: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--format: this export needs {module}: pip install flatbuffers (stablehlo), or onnx, onnx-ir and, with "
            "--no-deps, jax2onnx (onnx)"
        )
