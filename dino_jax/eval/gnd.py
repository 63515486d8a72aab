"""The ground-truth pickles of revisited Oxford and Paris (`gnd_*.pkl`), read without running anything they say.

A pickle is a program that may call whatever it names. This reader knows containers, numbers, strings and NumPy's
numeric arrays, the latter through stand-ins that only collect bytes; every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from etils import epath

from dino_jax.errors import UserError

MAX_BYTES = 64 << 20
KEYS = ("imlist", "qimlist", "gnd")
PythonUnpickler: Any = pickle._Unpickler  # the pure-Python machine


def read_gnd(path: epath.PathLike) -> dict[str, Any]:
    """`{"imlist": names, "qimlist": names, "gnd": [{"easy", "hard", "junk": int arrays, ...} per query]}`.

    Raises:
      UserError: the file is absent, damaged or hostile, or lacks one of these.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file: download it from the revisited Oxford and Paris page")
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: {len(data)} bytes is too large for a ground-truth file")
    try:
        content = _plain(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except Exception as error:  # whatever a damaged or hostile pickle provokes
        raise UserError(f"{path}: not a ground-truth file ({type(error).__name__}: {error})") from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}: not a revisited Oxford or Paris file")
    if len(content["gnd"]) != len(content["qimlist"]):
        raise UserError(f"{path}: {len(content['qimlist'])} queries but truth for {len(content['gnd'])}")
    for entry in content["gnd"]:
        if not {"easy", "hard", "junk"} <= set(entry):
            raise UserError(f"{path}: a query lacks easy, hard or junk: take the *revisited* annotations")
        entry.update({key: np.asarray(entry[key], np.int64) for key in ("easy", "hard", "junk")})
        if any((rows < 0).any() or (rows >= len(content["imlist"])).any() for rows in _rows(entry)):
            raise UserError(f"{path}: a query names pictures outside of the {len(content['imlist'])} in imlist")
    return content


def _rows(entry: dict[str, Any]) -> list[np.ndarray]:
    return [entry[key] for key in ("easy", "hard", "junk")]


class _DType:
    """A numeric dtype: a code such as `i8`, then the byte order by state."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or code[:1] not in "biuf" or not code[1:].isdigit():
            raise ValueError(f"a NumPy dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in "<>" else "=")


class _Array:
    """An array as NumPy pickles it: empty first, then shape, dtype and bytes by state."""

    value = np.zeros(0)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if len(raw) != math.prod(shape) * kind.dtype.itemsize:
            raise ValueError(f"{len(raw)} bytes for an array of shape {shape}")
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _scalar(kind: _DType, raw: Any) -> Any:
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, kind.dtype, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _empty() -> bytes:
    """Python 3's empty bytes in the old pickle protocols."""
    return b""


def _from_buffer(raw: Any, kind: _DType, shape: tuple, order: str) -> _Array:
    """An array in the newest pickle protocol."""
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", bytes(raw)))
    return array


ALLOWED = {
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty,
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


class _Unpickler(PythonUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise ValueError(f"it asks for {module}.{name}, which is refused") from None


def _plain(value: Any) -> Any:
    """The same with arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value
