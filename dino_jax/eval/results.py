"""Reads and writes small results atomically: arrays and figures."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
from etils import epath

from dino_jax.data.storage import write_atomically
from dino_jax.errors import UserError


def save_arrays(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes a `.npz` to any etils path, including gs://."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def load_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` by name. Raises `UserError` if the file is damaged."""
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file ({error}): remove it") from None


def save_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
