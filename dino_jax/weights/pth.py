"""Reads and writes torch's `.pth` files without torch, and never runs code from a file.

The file is a zip archive of uncompressed members: `<name>/data.pkl` pickles the object, with each tensor as a call of
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, and `<name>/data/<key>` holds the bytes of one
storage. Before torch 1.6 it was a sequence of pickles and then the storages. Objects other than tensors, containers and
numbers become `unpickle.StandIn`. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np
from etils import epath

from dino_jax.data.storage import cause, new_file, open_file
from dino_jax.errors import UserError, printable
from dino_jax.weights.unpickle import (
    ARRAYS,
    CODES,
    NUMERIC,
    STATES,
    DType,
    RefusedError,
    StandIn,
    Unpickler,
    checked_shape,
    plain,
)

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
OTHER_STORAGES = {  # of tensors that are no weights: complex and quantized ones
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
    "QInt8Storage": "i1",
    "QUInt8Storage": "u1",
    "QInt32Storage": "i4",
}
DTYPES = {  # of tensors in untyped storages
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64")},
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
MAX_PICKLE = 32 << 20  # bytes of data.pkl; a full checkpoint has about 0.2 MB
MAX_DIRECTORY = 2 << 20  # bytes of the zip's list of members, about 25,000
VIEWS = 4  # how many times the size of the file its tensors may have together; they can share storages
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # torch < 1.6, in a pickle of its own
PythonPickler: Any = pickle._Pickler  # the pure-Python pickler, missing from type stubs
ALIGNMENT = 64  # bytes; torch aligns storages so that they can be memory-mapped


def read_pth(path: epath.PathLike) -> Any:
    """The object in a `.pth` file: dicts, lists, numbers, and read-only NumPy arrays instead of tensors.

    Arrays keep the tensor's dtype (bfloat16 and float8 by `ml_dtypes`) and strides. Objects of other kinds are
    `StandIn`s: nothing is imported or run for them.

    Raises:
      UserError: the file is missing, truncated, not a checkpoint, a program or a whole pickled object instead of
        tensors, uses a name that only hostile files use, or claims more memory than its size justifies.
    """
    path = epath.Path(path)
    try:
        with open_file(path) as file:
            start = file.read(1024)
            if start.startswith(b"\x80") and LEGACY_MAGIC in start[:32]:
                file.seek(0)
                content = _read_legacy(file.read())
            elif start.startswith(b"PK\x03\x04"):
                content = _read_zip(path, file)
            else:
                raise UserError(f"{path}: {_describe(start)}")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except RefusedError as refused:
        raise UserError(
            f"{path}: its pickle uses {printable(str(refused))}, which weights never need; it may be hostile, and "
            "nothing was run"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from None
    except Exception as error:  # damaged or hostile pickles raise anything
        raise UserError(
            f"{path}: damaged, hostile or not a torch checkpoint ({type(error).__name__}: {printable(cause(error))}); "
            "download or save it again"
        ) from None
    if isinstance(content, StandIn):
        raise UserError(
            f"{path}: holds a whole pickled object, {printable(content.name)}, which only its own code can open; "
            "there, save torch.save(model.state_dict(), FILE)"
        )
    return content


def _describe(start: bytes) -> str:
    """Says what a file that is not a checkpoint is, from its first bytes."""
    if not start:
        return "the file is empty; download it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page (HTML or XML) saved under this name, not a checkpoint; check the address and download again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return f"{what}, not weights that this package reads; give a .pth or .safetensors file"
    if start.startswith(b"\x80"):
        return "a bare pickle, not a torch checkpoint; save the weights with torch.save(model.state_dict(), ...)"
    return "not a torch checkpoint (.pth); expected a zip archive written by torch.save"


MAGIC = {
    b"\x89HDF\r\n": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
}


def _read_zip(path: epath.Path, file: BinaryIO) -> Any:
    size = file.seek(0, io.SEEK_END)
    capped = _Capped(file)
    try:
        with zipfile.ZipFile(capped) as archive:
            capped.most = size
            infos = archive.infolist()
            names = {info.filename for info in infos}
            pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                arrays = "; it is a NumPy archive (.npz)" if names and all(n.endswith(".npy") for n in names) else ""
                raise UserError(f"{path}: a zip archive, but not a torch checkpoint (it holds no data.pkl{arrays})")
            prefix = pickles[0].removesuffix("data.pkl")
            if any(name.startswith(f"{prefix}code/") for name in names):
                raise UserError(f"{path}: a TorchScript program; save torch.save(model.state_dict(), FILE) instead")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise UserError(f"{path}: its members are compressed, which torch.save never does: refused")
            if sum(info.file_size for info in infos) > size or archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
                raise UserError(f"{path}: its members claim more bytes than the file has: refused")
            if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
                raise UserError(f"{path}: written on a big-endian machine; load and save it once with torch elsewhere")
            storages = _Storages(lambda key: archive.read(f"{prefix}data/{key}"), VIEWS * size)
            return storages.unpickled(archive.read(pickles[0]))
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise UserError(f"{path}: damaged ({printable(str(error))}); download it again") from None
        raise UserError(f"{path}: truncated or damaged at {size} bytes; download it again") from None


def _read_legacy(data: bytes) -> Any:
    """Torch's format before 1.6: pickles of a magic number, a version, facts, the object, and the storages' keys.

    Then each storage: its number of elements, and their bytes.
    """
    kinds: dict[str, np.dtype] = {}

    def note(pid: Any) -> Any:
        if pid[0] == "module":
            return pid[1]
        key, kind, _ = _storage_id(pid)
        if not isinstance(kind, StandIn):
            kinds[key] = kind.dtype
        return StandIn("a storage")

    place = 0
    for _ in range(3):
        place += _end(Unpickler(data[place : place + (1 << 12)], {}, {}))
    start = place
    types = {name: kind for name, kind in ALLOWED.items() if isinstance(kind, _StorageType)}
    place += _end(Unpickler(data[place : place + MAX_PICKLE], types, {}, load=note, stand_ins=True))
    body = data[start:place]
    listed = Unpickler(data[place : place + MAX_PICKLE], {}, {})
    keys = listed.load()
    place += listed.end
    found: dict[str, memoryview] = {}
    for key in keys:
        count = int.from_bytes(data[place : place + 8], "little")
        end = place + 8 + count * kinds[key].itemsize
        if end > len(data):
            raise EOFError("truncated; download it again")
        found[key], place = memoryview(data)[place + 8 : end], end
    return _Storages(found.__getitem__, VIEWS * len(data)).unpickled(body)


def _end(pickled: Unpickler) -> int:
    pickled.load()
    return pickled.end


class _Capped:
    """A file whose reads are refused beyond `most` bytes: `zipfile` reads its directory whole, as long as it claims."""

    def __init__(self, file: BinaryIO):
        self._file, self.most = file, MAX_DIRECTORY

    def read(self, size: int = -1) -> bytes:
        if size > self.most:
            raise ValueError(f"a list of members of {size} bytes, which no weights need")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class _Storages:
    """Looks up a file's storages by persistent id, reading each once, and makes the tensors.

    Args:
        read: the bytes of a storage by its key.
        most: bytes that all tensors may have together.
    """

    def __init__(self, read: Callable[[str], bytes | memoryview], most: int):
        self._read, self._left = read, most + (1 << 20)
        self._known: dict[str, np.ndarray] = {}

    def unpickled(self, data: bytes) -> Any:
        """The object of a pickle."""
        names = {f"torch._utils._rebuild_tensor{version}": self._tensor for version in ("", "_v2")}
        names["torch._utils._rebuild_tensor_v3"] = self._typed
        return plain(Unpickler(data, {**ALLOWED, **names}, TAKES, load=self._storage, stand_ins=True).load())

    def _storage(self, pid: Any) -> Any:
        if pid[0] == "module":  # in the old format, a class with its source
            return pid[1]
        key, kind, count = _storage_id(pid)
        if isinstance(kind, StandIn):
            return kind
        if key not in self._known:
            data = self._read(key)
            if len(data) != count * kind.dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes for {count} of {kind.dtype}")
            self._known[key] = np.frombuffer(data, kind.dtype)
        return self._known[key]

    def _tensor(self, storage: Any, offset: int, shape: tuple, strides: tuple, *_: Any) -> Any:
        """A view of `storage` with these strides (in elements), checked to stay in bounds."""
        if isinstance(storage, StandIn):
            return storage
        shape, strides = checked_shape(shape), checked_shape(strides)
        if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and len(shape) == len(strides)):
            raise ValueError("a tensor that is not a view of a storage")
        (offset,) = checked_shape((offset,))
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, storage.dtype)
        if offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= storage.size:
            raise ValueError(f"a tensor of shape {shape} lies outside its storage of {storage.size}")
        step = storage.itemsize
        self._left -= count * step + 64
        if self._left < 0:
            raise ValueError("its tensors together claim far more bytes than the file has")
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, [n * step for n in strides], writeable=False)

    def _typed(self, storage: Any, offset: int, shape: tuple, strides: tuple, grad: Any, hooks: Any, *rest: Any) -> Any:
        """A tensor in an untyped storage; the dtype is the first of `rest`."""
        if isinstance(rest[0], StandIn):
            return rest[0]
        return self._tensor(storage.view(rest[0].value), offset, shape, strides)


def _storage_id(pid: Any) -> tuple[str, Any, int]:
    """Key, type and number of elements in a persistent id."""
    word, kind, key, _, count = pid[:5]  # the old format adds a view, which torch no longer writes
    known = word == "storage" and isinstance(kind, (_StorageType, StandIn)) and isinstance(key, str)
    if not known or type(count) is not int or any(view is not None for view in pid[5:]):
        raise ValueError("a persistent id that is not a storage")
    return key, kind, count


@dataclasses.dataclass(frozen=True)
class _DType:
    value: np.dtype


def _ordered(pairs: Any = ()) -> collections.OrderedDict[str, Any]:
    if not all(isinstance(key, str) for key, _ in pairs):
        raise ValueError("an OrderedDict with a key that is not text")
    return collections.OrderedDict(pairs)


def _of_code(code: Any, *_: Any) -> Any:
    return DType(code) if code in CODES else StandIn(f"numpy.dtype {str(code)[:20]}")  # text, dates, objects


ALLOWED = {
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{place}UntypedStorage": _StorageType(np.dtype(np.uint8)) for place in ("", "storage.")},
    **{f"torch.{name}": _StorageType(np.dtype(code)) for name, code in OTHER_STORAGES.items()},
    **{f"torch.{name}": _DType(dtype) for name, dtype in DTYPES.items()},
    **NUMERIC,
    **ARRAYS,
    "numpy.dtype": _of_code,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "argparse.Namespace": argparse.Namespace,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}
TAKES = {
    **STATES,
    argparse.Namespace: lambda namespace, state: namespace.__dict__.update(state),
    collections.OrderedDict: lambda *_: None,  # its `_metadata` is dropped
}


class _Pickler(PythonPickler):
    """Pickles NumPy arrays as torch pickles tensors, collecting their storages."""

    dispatch: ClassVar = dict(PythonPickler.dispatch)

    def __init__(self, file: Any):
        super().__init__(file, protocol=2)
        self.storages: list[np.ndarray] = []

    def save_array(self, array: np.ndarray) -> None:
        names = {dtype: name for name, dtype in STORAGES.items()}
        data = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar 1-D
        self.write(pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK)
        self.save("storage")
        self.write(pickle.GLOBAL + f"torch\n{names[data.dtype]}\n".encode())
        self.save(str(len(self.storages)))
        self.save("cpu")
        self.save(data.size)
        self.write(pickle.TUPLE + pickle.BINPERSID)
        strides = tuple(n // data.itemsize for n in data.strides)
        view: tuple[Any, ...] = (0, data.shape, strides, False, collections.OrderedDict())
        for item in view:
            self.save(item)
        self.write(pickle.TUPLE + pickle.REDUCE)
        self.memoize(array)
        self.storages.append(data)

    dispatch[np.ndarray] = save_array


def write_pth(path: epath.PathLike, value: Any) -> None:
    """Writes nested dicts, lists, numbers and NumPy arrays as a `.pth` that `torch.load(weights_only=True)` reads.

    Arrays become contiguous tensors. The bytes are deterministic. The file appears whole or not at all.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    with new_file(path) as local, zipfile.ZipFile(local, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", buffer.getvalue())
        _add(archive, "byteorder", b"little")
        for key, storage in enumerate(pickler.storages):
            _add(archive, f"data/{key}", storage.tobytes())
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Adds a member aligned to `ALIGNMENT`, padded in the `FB` extra field as torch does."""
    info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None  # it is open
    start = archive.fp.tell() + 30 + len(info.filename) + 4  # 30: local header; 4: extra-field header
    padding = -start % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(info, data)
