"""Reads and writes torch's zip-format `.pth` files without torch, and never runs code from a file.

The file is a zip archive of uncompressed members: `<name>/data.pkl` pickles the object, with each tensor as a call of
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, and `<name>/data/<key>` holds the bytes of one
storage. `unpickle.Unpickler` accepts only the names in `ALLOWED`. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import _codecs
import argparse
import collections
import dataclasses
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from etils import epath

from dino_jax.data.storage import new_file
from dino_jax.errors import UserError
from dino_jax.weights.unpickle import CODES, NUMERIC, STATES, RefusedError, Unpickler

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
MAX_PICKLE = 64 << 20  # bytes of data.pkl; a full checkpoint has about 0.2 MB
MAX_EXPANDED = 1 << 24  # elements of a tensor whose strides repeat its storage
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # magic number of torch < 1.6
PythonPickler: Any = pickle._Pickler  # the pure-Python pickler, missing from type stubs
ALIGNMENT = 64  # bytes; torch aligns storages so that they can be memory-mapped


def read_pth(path: epath.PathLike) -> Any:
    """The object in a `.pth` file: dicts, lists, numbers, and read-only NumPy arrays instead of tensors.

    Arrays keep the tensor's dtype (bfloat16 by `ml_dtypes`) and strides. Torch's legacy format is read by torch itself
    with `weights_only`, if installed.

    Raises:
      UserError: the file is missing, truncated, not a checkpoint, or uses a name not in the allow-list.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(1024)
        if start.startswith(LEGACY_MAGIC):
            return _read_legacy(path)
        if not start.startswith(b"PK\x03\x04"):
            raise UserError(f"{path}: {_describe(start)}")
        return _read_zip(path, file)


def _describe(start: bytes) -> str:
    """Says what a file that is not a checkpoint is, from its first bytes."""
    if not start:
        return "the file is empty; download it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page (HTML or XML) saved under this name, not a checkpoint; check the address and download again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    if start.startswith(b"\x80"):
        return "a bare pickle, not a torch checkpoint; save the weights with torch.save(model.state_dict(), ...)"
    return "not a torch checkpoint (.pth); expected a zip archive written by torch.save"


def _read_zip(path: epath.Path, file: Any) -> Any:
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path}: a zip archive, but not a torch checkpoint (it holds no data.pkl)")
            prefix = pickles[0].removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise UserError(f"{path}: its members are compressed, which torch.save never does: refused")
            if sum(info.file_size for info in members.values()) > size or members[pickles[0]].file_size > MAX_PICKLE:
                raise UserError(f"{path}: its members claim more bytes than the file has: refused")
            if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
                raise UserError(f"{path}: written on a big-endian machine; load and save it once with torch elsewhere")
            storages = _Storages(lambda key: archive.read(f"{prefix}data/{key}"))
            return Unpickler(archive.read(pickles[0]), ALLOWED, TAKES, load=storages).load()
    except UserError:
        raise
    except RefusedError as refused:
        raise UserError(
            f"{path}: its pickle uses {refused}, which weights never need; it may be hostile, and nothing was run"
        ) from None
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise UserError(f"{path}: damaged ({error}); download it again") from None
        raise UserError(f"{path}: truncated or damaged at {size} bytes; download it again") from None
    except Exception as error:  # damaged or hostile pickles raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged or not a torch checkpoint ({type(error).__name__}: {reason})") from None


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class _Storages:
    """Looks up an archive's storages by persistent id, reading each once."""

    def __init__(self, read: Callable[[str], bytes]):
        self._read = read
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError("a persistent id that is not a storage")
        if key not in self._known:
            data = self._read(key)
            if len(data) != count * storage_type.dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes for {count} of {storage_type.dtype}")
            self._known[key] = np.frombuffer(data, storage_type.dtype)
        return self._known[key]


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """A view of `storage` with these strides (in elements), checked to stay in bounds."""
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and len(shape) == len(strides)):
        raise ValueError("a tensor that is not a view of a storage")
    if min(offset, *shape, *strides, 0) < 0:
        raise ValueError(f"a tensor with negative size or stride: {shape}, {strides}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.size or count > max(storage.size, MAX_EXPANDED)):
        raise ValueError(f"a tensor of shape {tuple(shape)} lies outside its storage of {storage.size}")
    step = storage.itemsize
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [n * step for n in strides], writeable=False)
    return view if count else np.zeros(shape, storage.dtype)


ALLOWED = {
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
    **NUMERIC,
    "collections.OrderedDict": collections.OrderedDict,
    "argparse.Namespace": argparse.Namespace,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
TAKES = {
    **STATES,
    argparse.Namespace: lambda namespace, state: namespace.__dict__.update(state),
    collections.OrderedDict: lambda *_: None,  # its `_metadata` is dropped
}


def _read_legacy(path: epath.Path) -> Any:
    """Torch's format before 1.6, by torch under `weights_only` with the same allow-list."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: in torch's old format (before 1.6), which only torch reads: pip install torch, or save it again "
            "elsewhere with a newer torch"
        ) from None
    from numpy._core.multiarray import scalar

    dtypes = [type(np.dtype(code)) for code in CODES]
    safe: list[Any] = [argparse.Namespace, np.dtype, *dtypes, (_codecs.encode, "_codecs.encode")]
    safe += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(safe):
            return _to_numpy(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+) (was|whose)", str(error))
        reason = f"its pickle uses {refused[1]}" if refused else str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged or hostile: torch refuses it ({reason})") from None


def _to_numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_numpy(item) for item in value)
    if not hasattr(value, "detach"):
        return value
    value = value.detach()
    if str(value.dtype) == "torch.bfloat16":
        return value.float().numpy().astype(ml_dtypes.bfloat16)
    return value.numpy()


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
