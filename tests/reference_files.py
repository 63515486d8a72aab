"""The reference files: their names and paths."""

from __future__ import annotations

import os
import pathlib

import pytest

OWN = pathlib.Path(__file__).parent / "reference"  # the repository's copy
FILES = (
    "attention_threshold.npz",
    "copy_detection.npz",
    "family/dinov2_loss.npz",
    "family/dinov2_vit.npz",
    "family/dinov2_vit_reg_swiglu.npz",
    "family/dinov3_vit.npz",
    "family/ibot_loss.npz",
    "family/koleo.npz",
    "family/masking.npz",
    "family/schedules_v2.npz",
    "family/trajectory_dinov2.npz",
    "family/trajectory_dinov2_short.npz",
    "family/trajectory_ibot.npz",
    "family/trajectory_ibot_original.npz",
    "head.npz",
    "knn.npz",
    "label_propagation.npz",
    "linear_features.npz",
    "loss.npz",
    "official_checkpoint.pth",
    "pos_embed.npz",
    "retrieval.npz",
    "schedules.npz",
    "trajectory_adamw.npz",
    "trajectory_lars.npz",
    "trajectory_sgd.npz",
    "vit.npz",
)


def own(name: str) -> pathlib.Path:
    """The path of a file in the repository's copy; fails the test if it is missing."""
    path = OWN / name
    if not path.is_file():
        pytest.fail(f"{path} is missing: restore it with `git checkout -- tests/reference`", pytrace=False)
    return path


def chosen(name: str) -> pathlib.Path:
    """The path of a file in `$DINO_REFERENCE`, a folder of other tensors in the same format; if unset, `own(name)`.

    Skips the test if the file is missing from `$DINO_REFERENCE`.
    """
    folder = os.environ.get("DINO_REFERENCE")
    if not folder:
        return own(name)
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"DINO_REFERENCE={folder} is not a folder", pytrace=False)
    path = pathlib.Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path
