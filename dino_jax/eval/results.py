"""Reads and writes small results: arrays, figures, and what may be lost without losing the figures."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from dino_jax.data.storage import cause, read_file, write_atomically
from dino_jax.errors import UserError

_log = logging.getLogger(__name__)


def save_arrays(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes a `.npz` to any etils path, including gs://."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def load_arrays(path: epath.PathLike, expected: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` that `save_arrays` wrote, by name.

    Args:
      expected: the arrays that must be there, and only those: name -> (dtype's kind: "i" integer or "f" floating-point,
        number of axes). Floating-point values must be finite.

    Raises:
      UserError: the file is damaged or holds something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_file(path))) as file:
            held = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if held.keys() != expected.keys():
                raise ValueError(f"it holds {', '.join(sorted(held))[:200] or 'nothing'}")
            arrays = {name: _array(file, info) for name, info in held.items()}
    except Exception as error:  # damaged files raise nearly anything
        raise UserError(f"{path}: not a file of results that can be read ({cause(error)}): remove it") from error
    for name, (kind, axes) in expected.items():
        array = arrays[name]
        if array.dtype.kind != kind or array.ndim != axes or (kind == "f" and not np.isfinite(array).all()):
            raise UserError(f"{path}: {name} is {array.dtype} {array.shape}, or holds NaN: remove the file")
    return arrays


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One member, whose header must claim no more than the member holds: nothing larger than the file is allocated."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    member = io.BytesIO(file.read(info))
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(member)](member)
    rest = member.read()
    if dtype.hasobject or len(rest) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.filename} has {len(rest)} bytes for {dtype} {shape}")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C").copy()


def to_json(value: Any, **options: Any) -> str:
    """Valid JSON of figures: numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | bool | int | None):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def save_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON."""
    write_atomically(path, to_json(value, indent=2) + "\n")


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Turns any error of the block into a warning: a drawing or a cache that fails must not cost the figures."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: not written: %s", what, cause(error))
