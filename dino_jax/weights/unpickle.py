"""Reads untrusted pickles without running code from them, in bounded time and memory.

A pickle can call anything it names. `Unpickler` resolves an allow-list of names to functions that only collect data.
Other names are refused or, on request, become `StandIn` objects, which do nothing.

Bounds: at most `MAX_OPCODES` operations; no length is believed beyond the end of the data; calls may copy a few times
the size of the data in total; and only short values are hashed, so keys can neither collide nor nest.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

PythonUnpickler: Any = pickle._Unpickler  # the pure-Python unpickler, missing from type stubs
CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
MAX_OPCODES = 300_000  # a full checkpoint of 1,000 parameters has about 100,000
MAX_NAME = 300  # characters
COPIES = 4  # how many times the size of the data may be copied by calls

# Names that no data needs: modules that run code, and functions elsewhere that do. The second part is exempt.
HOSTILE = re.compile(
    r"(__builtin__|builtins|os|posix|nt|sys|subprocess|commands|popen2|shutil|importlib|runpy|codeop|pty|pdb|bdb|timeit"
    r"|cProfile|socket|ssl|ctypes|_ctypes|marshal|pickle|_pickle|cPickle|dill|cloudpickle|pip|ensurepip|distutils"
    r"|webbrowser|pydoc|doctest|urllib|urllib2|requests|ftplib|smtplib|telnetlib|asyncio|multiprocessing|threading"
    r"|_thread|operator|_operator|linecache|io|_io|types|torch\.hub|torch\.utils\.cpp_extension|numpy\.testing\S*"
    r"|numpy\.f2py\S*|code\.Interactive\w*)\..*|code\.(interact|Interactive\w*)"
    r"|(torch|numpy|joblib|pandas|yaml)\.(load|unsafe_load|save|fromfile|memmap|read_pickle)"
    r"|torch\.(jit|serialization)\.(load|_load|_legacy_load)|torch\.storage\._load_from_bytes"
)
HARMLESS = re.compile(
    r"(__builtin__|builtins)\.(object|set|frozenset|list|dict|tuple|str|unicode|bytes|bytearray|int|long|float|complex"
    r"|bool|slice|range|xrange|type|\w*(Error|Exception|Warning)|NotImplemented|Ellipsis)"
    r"|types\.(SimpleNamespace|MappingProxyType)|_?io\.(BytesIO|StringIO)"
)
RECONSTRUCT = ("copyreg._reconstructor", "copy_reg._reconstructor")  # their first argument is the class of the object


class RefusedError(Exception):
    """A name that is not on the allow-list."""


class StandIn:
    """Stands for an object, class or function that was not created: only its name is kept, nothing is ever run."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Unpickler(PythonUnpickler):
    """The pure-Python unpickler with restricted names, states and persistent ids, and bounded.

    Its memo is a dict, so no opcode can reserve memory.

    Args:
        data: the pickle, and possibly more; after `load`, `end` is where it ended.
        allowed: "module.name" -> function or stand-in.
        states: type -> setter of the state of exactly that type (`BUILD`, which by default sets attributes on
            anything). Other types raise ValueError.
        load: resolves persistent ids; without it they raise ValueError.
        encoding: for Python 2 byte strings.
        stand_ins: other names become `StandIn`, except those that hostile files use; else they raise `RefusedError`.
    """

    dispatch: Any = dict(PythonUnpickler.dispatch)

    def __init__(
        self,
        data: bytes,
        allowed: Mapping[str, Any],
        states: Mapping[type, Callable[[Any, Any], object]],
        *,
        load: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
        stand_ins: bool = False,
    ):
        self._file = _Whole(data)
        super().__init__(self._file, encoding=encoding)
        self._allowed, self._states, self._load, self._stand_ins = allowed, states, load, stand_ins
        self._left = COPIES * len(data) + (1 << 16)
        self.dispatch = _Counted(type(self).dispatch)

    @property
    def end(self) -> int:
        """Where the pickle ended in the data."""
        return self._file.tell()

    def charge(self, *values: Any) -> None:
        """Counts a copy of these values; ValueError when there were too many."""
        self._left -= 1 + sum(_size(value) for value in values)
        if self._left < 0:
            raise ValueError("it copies its data again and again")

    def load(self) -> Any:
        """The object; without garbage collection, which takes as long again for many small objects."""
        collected = gc.isenabled()
        gc.disable()
        try:
            return super().load()
        finally:
            if collected:
                gc.enable()

    def find_class(self, module: str, name: str) -> Any:
        self.charge(module, name)
        full = f"{module}.{name}"
        if len(full) > MAX_NAME:
            raise ValueError(f"a name of {len(full)} characters")
        if full in self._allowed:
            return self._allowed[full]
        if self._stand_ins and full == "builtins.getattr":  # enum members in Python 3.11
            return _attribute
        if not self._stand_ins or (HOSTILE.fullmatch(full) and not HARMLESS.fullmatch(full)):
            raise RefusedError(full)
        return StandIn(full)

    def call(self, function: Any, args: Any) -> Any:
        """The result of an allowed function, or a new `StandIn` for a stand-in's."""
        if not isinstance(args, tuple):
            raise ValueError("a call without a tuple of arguments")
        if isinstance(function, StandIn):
            return self.call(args[0], ()) if function.name in RECONSTRUCT else StandIn(function.name)
        self.charge(*args)
        return function(*args)

    def key(self, value: Any) -> Any:
        """`value` if it is a short key of plain kind, else a stand-in for it that is cheap to hash."""
        if value is None or type(value) is bool or (type(value) is int and abs(value) < 1 << 60):
            return value
        if type(value) in (str, bytes):
            self.charge(value)
            return value
        return value if isinstance(value, StandIn) else StandIn(f"a key of type {type(value).__name__}")

    def persistent_load(self, pid: Any) -> Any:
        if self._load is None:
            raise ValueError("a persistent id")
        return self._load(pid)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        if kwargs and not isinstance(self.stack[-1], StandIn):
            raise ValueError("an object made with keywords")
        self.stack[-1] = self.call(self.stack[-1], args)

    def _instantiate(self, function: Any, args: Any) -> None:  # INST and OBJ
        self.append(self.call(function, tuple(args)))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            return
        if type(target) not in self._states:
            raise ValueError(f"state for a {type(target).__name__}")
        self.charge(*(state if isinstance(state, tuple) else (state,)))
        self._states[type(target)](target, state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(self._pairs(items))
        elif not isinstance(target, StandIn):
            raise ValueError(f"items for a {type(target).__name__}")

    def _pairs(self, items: list) -> list[tuple[Any, Any]]:
        return [(self.key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(self._pairs(items)))

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise ValueError(f"items for a {type(target).__name__}")

    def load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target.update(map(self.key, items))
        elif not isinstance(target, StandIn):
            raise ValueError(f"items for a {type(target).__name__}")

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(self.key, items)))

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def load_put(self) -> None:
        place = int(self.readline()[:-1])
        if not 0 <= place < 1 << 32:
            raise ValueError("a memo index out of range")
        self.memo[place] = self.stack[-1]

    def get_extension(self, code: int) -> None:
        raise RefusedError(f"copyreg extension {code}")

    for _code, _method in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_reduce,
        pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.BUILD: load_build,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.DICT: load_dict,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.ADDITEMS: load_additems,
        pickle.FROZENSET: load_frozenset,
        pickle.BYTEARRAY8: load_bytearray8,
        pickle.PUT: load_put,
    }.items():
        dispatch[_code[0]] = _method
    del _code, _method


class _Whole(io.BytesIO):
    """Bytes whose `read` gives all that is asked for or raises EOFError before any allocation."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._length = len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._length - self.tell():
            raise EOFError(f"{size} bytes claimed where {self._length - self.tell()} are left")
        return super().read(size)


class _Counted(dict):
    """The methods by opcode; ValueError after `MAX_OPCODES` look-ups."""

    left = MAX_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_OPCODES} operations, which no weights need")
        return super().__getitem__(code)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() >> 3
    return len(value) if hasattr(value, "__len__") and not isinstance(value, np.ndarray) else 1


def _attribute(owner: Any, name: Any = None, *_: Any) -> StandIn:
    if not (isinstance(owner, StandIn) and isinstance(name, str)):
        raise RefusedError("builtins.getattr")
    return StandIn(f"{owner.name}.{name[:MAX_NAME]}"[:MAX_NAME])


class DType:
    """Stand-in for a pickled NumPy dtype: a code such as `f8`, then the byte order as state."""

    def __init__(self, code: str, *_: Any):
        if code not in CODES:
            raise ValueError(f"a NumPy dtype {str(code)[:50]!r}")
        self.value = np.dtype(code)

    def set_order(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1] if state[1] in ("<", ">") else "=")


class Array:
    """Stand-in for a pickled NumPy array: created empty, then shape, dtype and bytes as state."""

    def __init__(self, *_: Any):
        self.value: Any = np.zeros(0)

    def fill(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(kind, StandIn):  # of objects, text or dates
            self.value = kind
            return
        data = _bytes(data)
        if len(data) != math.prod(checked_shape(shape)) * kind.value.itemsize:
            raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
        self.value = np.frombuffer(data, kind.value).reshape(shape, order="F" if fortran else "C")


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape that NumPy accepts; ValueError if it is none."""
    if not (isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 60 for n in shape)):
        raise ValueError("a shape that is not up to 32 sizes")
    return shape


def plain(value: Any, known: dict[int, Any] | None = None) -> Any:
    """Replaces each `Array` by its NumPy array, in dicts, lists and tuples. Shared values stay shared."""
    known = {} if known is None else known
    if isinstance(value, Array):
        return value.value
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) not in known:
        if isinstance(value, dict):
            copy: Any = known.setdefault(id(value), type(value)())
            copy.update((key, plain(item, known)) for key, item in value.items())
        elif isinstance(value, list):
            copy = known.setdefault(id(value), [])
            copy.extend(plain(item, known) for item in value)
        else:
            known[id(value)] = tuple(plain(item, known) for item in value)
    return known[id(value)]


def _scalar(kind: DType | StandIn, data: Any) -> Any:
    return kind if isinstance(kind, StandIn) else np.frombuffer(_bytes(data), kind.value, 1)[0]


def _from_buffer(data: Any, kind: DType, shape: tuple, order: str) -> Array:
    """An array in pickle protocol 5."""
    array = Array()
    array.fill((1, shape, kind, order == "F", bytes(data)))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in older protocols."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode({str(encoding)[:50]!r})")
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
