"""The format of `dino-jax pack`: ArrayRecord shards with a manifest, and the source that reads them.

A record is msgpack: [image, label, name], the image as encoded bytes (arrays as .npy). `manifest.json` holds at least
`format` ("dino-jax"), `version` (1), `count` (images), `shards` (list of {"file", "count"}, in order) and
`class_names` (list or null); other keys are informative. Shards are written with group_size 1, so that every record
is read alone, and uncompressed, since images are compressed already.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage
from dino_jax.data.example import Example, Kind
from dino_jax.data.storage import cause, is_remote, open_file, read_json
from dino_jax.errors import UserError, printable

MANIFEST = "manifest.json"
FORMAT, VERSION = "dino-jax", 1
REPAIR = "the `dino-jax pack` command that made the folder repairs it"
WRITER_OPTIONS = "group_size:1,uncompressed"


def encode_record(example: Example) -> bytes:
    """One example as the bytes of a record."""
    image = example.image
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, image, allow_pickle=False)
        image = buffer.getvalue()
    return msgpack.packb([image, example.label, example.name])


def decode_record(record: bytes) -> Example:
    """The inverse of `encode_record`. Raises ValueError for other bytes."""
    image, label, name = msgpack.unpackb(record)
    if not (isinstance(image, bytes) and type(label) is int and isinstance(name, str)):
        raise ValueError("not a record of `dino-jax pack`")
    return Example(image, label, name)


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a packed folder. Raises `UserError` if it is absent, damaged or of another version."""
    file = epath.Path(path) / MANIFEST
    if not file.exists():
        raise UserError(f"{path}: no {MANIFEST} in it; was `dino-jax pack` finished?")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file}: not a manifest of `dino-jax pack`")
    if manifest.get("version") != VERSION:
        raise UserError(f"{file}: version {manifest.get('version')!r}, this code reads {VERSION}: update dino-jax")
    if wrong := _wrong(manifest):
        raise UserError(f"{file}: damaged: {wrong}; pack again into another folder")
    return manifest


def _wrong(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest's values, or ""."""
    names, shards = manifest.get("class_names"), manifest.get("shards")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "class_names is not a list of names"
    if not (isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards)):
        return "shards is not a list of objects"
    for number, shard in enumerate(shards):
        file = shard.get("file")
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            return f"the file of shard {number} is not the name of a file in this folder"
        for key in ("count", "bytes", "crc32"):
            if not _is_count(shard.get(key, 0 if key != "count" else None)):
                return f"{key} of shard {number} is not a whole number from 0 on"
    total = sum(shard["count"] for shard in shards)
    if manifest.get("count") != total or not _is_count(manifest["count"]):
        return f"count is {manifest.get('count')!r} where its shards hold {total} images"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def shard_error(path: epath.PathLike, about: Mapping[str, Any]) -> str:
    """Why a shard is not as the manifest says, or "". Only its headers are read."""
    from array_record.python import array_record_module

    try:
        if is_remote(path):
            size = epath.Path(path).stat().length
        else:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
        if size != about.get("bytes", size):
            return f"has {size} bytes where {about['bytes']} were written"
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # RuntimeError, often without a message; clients of buckets raise their own
        return f"is damaged ({cause(error)})"
    return "" if count == about["count"] else f"has {count} records where the manifest says {about['count']}"


class PackedSource:
    """A folder written by `dino-jax pack`."""

    def __init__(self, path: str):
        self.path = path
        self.manifest = read_manifest(path)
        names = self.manifest["class_names"]
        self.class_names = tuple(names) if names is not None else None
        for shard in self.manifest["shards"]:
            if reason := shard_error(os.path.join(path, shard["file"]), shard):
                raise UserError(f"{os.path.join(path, shard['file'])}: this shard {reason}; {REPAIR}")
        self._open()

    def _open(self) -> None:
        from array_record.python import array_record_data_source

        self._ends = list(itertools.accumulate(shard["count"] for shard in self.manifest["shards"]))
        shards = [(shard["file"], shard["count"]) for shard in self.manifest["shards"] if shard["count"]]
        files = [f"{os.path.join(self.path, file)}[0:{count}]" for file, count in shards]  # the library's way of slices
        self._records = array_record_data_source.ArrayRecordDataSource(files) if files else []

    @property
    def listing(self) -> tuple[np.ndarray, ...]:
        """Sizes and checksums of the shards (see `identity`)."""
        return (np.frombuffer(json.dumps(self.manifest["shards"]).encode(), np.uint8),)

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Example:
        try:
            example = decode_record(self._records[index])
            return example._replace(name=printable(example.name))
        except Exception as error:  # whatever the reader raises for a damaged shard
            shard = bisect.bisect_right(self._ends, index)
            bad = BadImage(f"a damaged record ({cause(error)}); {REPAIR}")
            record = index - (self._ends[shard] - self.manifest["shards"][shard]["count"])
            bad.name = f"{self.manifest['shards'][shard]['file']}, record {record}"
            raise bad from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


KINDS = {"arrayrecord": Kind(PackedSource)}
