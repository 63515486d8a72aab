"""The libraries this package is compared with (torch, torchvision, timm, transformers), if installed."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from types import ModuleType
from typing import Any

import pytest

_registered: list[Any] = []  # a torch library's schemas live as long as its object


def peer(name: str) -> ModuleType:
    """Imports a peer module such as `timm` or `torchvision.models`, or skips the test if it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    _let_torchvision_import()
    return importlib.import_module(name)


def _let_torchvision_import() -> None:
    """Gives a CPU build of torch the operator schemas that torchvision's package asks for when imported.

    A torchvision wheel built for CUDA cannot load its own operators there; its transforms and models need none of them.
    """
    torch, spec = pytest.importorskip("torch"), importlib.util.find_spec("torchvision")
    if _registered or spec is None or spec.origin is None:
        return
    try:
        for library in pathlib.Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library = torch.library.Library("torchvision", "DEF")
        library.define(f"nms{boxes}")
        library.define(f"qnms{boxes}")
        align = "SymInt pooled_height, SymInt pooled_width, int sampling_ratio, bool aligned"
        library.define(f"roi_align(Tensor input, Tensor rois, float spatial_scale, {align}) -> Tensor")
        _registered.append(library)
