"""Reads weight files of every kind as nested dicts of tensors: `.pth`, safetensors, and folders with shards.

Lengths in a file are checked against its size before anything is allocated.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from dino_jax.data.storage import cause, open_file, read_json
from dino_jax.errors import UserError, printable
from dino_jax.weights.pth import read_pth

log = logging.getLogger(__name__)

DTYPES = {  # of safetensors
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{letter}{8 * size}": np.dtype(f"<{letter.lower()}{size}") for letter in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 4 << 20  # bytes of JSON before the tensors, about 40,000 of them
INDEX = ".index.json"
WHOLE = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")


def weight_file(folder: epath.PathLike) -> epath.Path | None:
    """The file with the weights, or the index of their shards, in a folder such as transformers writes; or None."""
    found = [epath.Path(folder) / name for name in WHOLE if (epath.Path(folder) / name).exists()]
    if len(found) > 1:
        log.info("%s: read; not %s beside it", found[0], ", ".join(path.name for path in found[1:]))
    return found[0] if found else None


def read_weights(path: epath.PathLike) -> Any:
    """The contents of a weight file (its kind is detected by content), of an index of shards, or of a folder of those.

    Raises:
      UserError: missing, not a regular file, truncated, hostile or not a weight file.
    """
    path = epath.Path(path)
    if path.is_dir():
        file = weight_file(path)
        if file is None:
            there = sorted(
                item.name for item in path.iterdir() if item.suffix in (".pth", ".pt", ".ckpt", ".safetensors")
            )
            these = f"; it has {', '.join(map(printable, there[:3]))}: give that file" if there else ""
            raise UserError(
                f"{path}: no model.safetensors or pytorch_model.bin in this folder{these}; to use a run, give its "
                "folder as --checkpoint"
            )
        path = file
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        with open_file(path) as file:
            start = file.read(9)
            if start[8:] == b"{" or path.suffix == ".safetensors":
                return _read_safetensors(path, file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from None
    return read_pth(path)


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of all shards named in an index file, which must agree with it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: not an index of weight files: it has no `weight_map` of names")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if name != shard.name or name.endswith(INDEX):
            raise UserError(f"{index}: it names {printable(name)!r}, which is not a file of this folder")
        if not shard.exists():
            raise UserError(f"{index}: the shard {printable(name)} is missing: download it, too")
        content = read_weights(shard)
        expected = {key for key, place in places.items() if place == name}
        if not isinstance(content, Mapping) or content.keys() != expected:
            differ = sorted(expected.symmetric_difference(content)) if isinstance(content, Mapping) else [name]
            raise UserError(f"{shard}: not the shard that {index.name} lists: they differ in {printable(differ[0])}")
        tensors |= content
    return tensors


def metadata(path: epath.PathLike) -> Mapping[str, Any]:
    """The free text by name in a safetensors file; empty for other files."""
    path = epath.Path(path)
    path = path / WHOLE[0] if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.exists():
        return {}
    with open_file(path) as file:
        found = _header(path, file)[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def _header(path: epath.Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """A safetensors file's description of its tensors, and where their data starts."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{path}: truncated or not a safetensors file; download it again")
    if length > MAX_HEADER:
        raise UserError(f"{path}: its header of {length} bytes is longer than weights need; refused")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = printable(cause(error))
        raise UserError(f"{path}: damaged or not a safetensors file: its header is not JSON ({reason})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged or not a safetensors file: its header is not an object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a key twice")
    return found


def _read_safetensors(path: epath.Path, file: BinaryIO) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, read-only views of its bytes.

    As the format demands, they lie one after the other and fill the file.
    """
    header, _ = _header(path, file)
    header.pop("__metadata__", None)
    data = file.read()
    layout, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        try:
            kind, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, begin, stop)) or len(shape) > 32:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: damaged: its header does not describe {printable(name)[:100]}") from None
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise UserError(
                f"{path}: {printable(name)[:100]} has the type {printable(str(kind))[:20]}, which is not read; "
                f"known are {', '.join(DTYPES)}"
            )
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: damaged: {printable(name)[:100]} does not lie where its header says")
        layout[name], end = (dtype, shape, begin), stop
    if end != len(data):
        what = f"truncated: {len(data)} of {end} bytes of tensors" if end > len(data) else "damaged: bytes left over"
        raise UserError(f"{path}: {what}; download it again")
    return {name: np.ndarray(shape, dtype, data, begin) for name, (dtype, shape, begin) in layout.items()}


def _begin(entry: Any) -> tuple[int, int]:
    """The sorting key of an entry: its offsets, empty tensors first; what is wrong is found later."""
    offsets: Any = entry.get("data_offsets") if isinstance(entry, dict) else None
    known = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    return (offsets[0], offsets[1]) if known else (-1, -1)


def is_tensors(value: Any) -> bool:
    """Whether a value is a state dict: only names mapped to arrays."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(item, np.ndarray) for key, item in value.items())
    )
