"""Reads untrusted pickles without running code from them.

A pickle can call anything it names. `Unpickler` resolves only an allow-list of names, to stand-ins that collect data,
and refuses all others.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

PythonUnpickler: Any = pickle._Unpickler  # the pure-Python unpickler, missing from type stubs
CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class RefusedError(Exception):
    """A name that is not on the allow-list."""


class Unpickler(PythonUnpickler):
    """The pure-Python unpickler with restricted names, states and persistent ids.

    Its memo is a dict, so no opcode can reserve memory.

    Args:
        data: the pickle.
        allowed: "module.name" -> stand-in. Other names raise `RefusedError`.
        states: type -> setter of the state of exactly that type (`BUILD`, which by default sets attributes on
            anything). Other types raise ValueError.
        load: resolves persistent ids; without it they raise ValueError.
        encoding: for Python 2 byte strings.
    """

    dispatch: ClassVar = dict(PythonUnpickler.dispatch)

    def __init__(
        self,
        data: bytes,
        allowed: Mapping[str, Any],
        states: Mapping[type, Callable[[Any, Any], object]],
        *,
        load: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
    ):
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._allowed, self._states, self._load = allowed, states, load

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        if self._load is None:
            raise ValueError("a persistent id")
        return self._load(pid)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in self._states:
            raise ValueError(f"state for a {type(target).__name__}")
        self._states[type(target)](target, state)

    dispatch[pickle.BUILD[0]] = load_build


class DType:
    """Stand-in for a pickled NumPy dtype: a code such as `f8`, then the byte order as state."""

    def __init__(self, code: str, *_: Any):
        if code not in CODES:
            raise ValueError(f"a NumPy dtype {code!r}")
        self.value = np.dtype(code)

    def set_order(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1] if state[1] in ("<", ">") else "=")


class Array:
    """Stand-in for a pickled NumPy array: created empty, then shape, dtype and bytes as state."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0)

    def fill(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        data = _bytes(data)
        if len(data) != math.prod(shape) * kind.value.itemsize:
            raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
        self.value = np.frombuffer(data, kind.value).reshape(shape, order="F" if fortran else "C")


def plain(value: Any) -> Any:
    """Replaces each `Array` by its NumPy array, in dicts, lists and tuples."""
    if isinstance(value, Array):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


def _scalar(kind: DType, data: Any) -> Any:
    return np.frombuffer(_bytes(data), kind.value, 1)[0]


def _from_buffer(data: Any, kind: DType, shape: tuple, order: str) -> Array:
    """An array in pickle protocol 5."""
    array = Array()
    array.fill((1, shape, kind, order == "F", bytes(data)))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in older protocols."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode({encoding!r})")
    return text.encode("latin1")


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


NUMERIC = {  # bytes, NumPy scalars and dtypes
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.dtypes.{type(np.dtype(code)).__name__}": lambda code=code: DType(code) for code in CODES},
    "numpy.dtype": DType,
    "_codecs.encode": _encode,
}
ARRAYS = {
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "numpy.ndarray": Array,
    "__builtin__.bytes": lambda: b"",  # empty, in older protocols
}
STATES: dict[type, Callable[[Any, Any], object]] = {DType: DType.set_order, Array: Array.fill}
