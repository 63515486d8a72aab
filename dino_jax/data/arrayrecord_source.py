"""The format of `dino-jax pack`: ArrayRecord shards beside a manifest, and the source that reads them.

A record is msgpack: [image, label, name], the image as encoded bytes (arrays as .npy). `manifest.json` holds at least
`format` ("dino-jax"), `version` (1), `count` (images), `shards` (list of {"file", "count"}, in order) and
`class_names` (list or null); the other keys inform. Shards are written with group_size 1, so that every record
is read alone, and uncompressed, since images are compressed already.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any

import msgpack
import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage
from dino_jax.data.example import Example, Kind
from dino_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT, VERSION = "dino-jax", 1
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
    """The inverse of `encode_record`."""
    return Example(*msgpack.unpackb(record))


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a packed folder. Raises `UserError` if it is absent or not one."""
    file = epath.Path(path) / MANIFEST
    if not file.exists():
        raise UserError(f"{path}: no {MANIFEST} in it; was `dino-jax pack` finished?")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(f"{file}: not a manifest of `dino-jax pack`, version {VERSION}")
    return manifest


class PackedSource:
    """A folder written by `dino-jax pack`."""

    def __init__(self, path: str):
        self.path = path
        self.manifest = read_manifest(path)
        names = self.manifest["class_names"]
        self.class_names = tuple(names) if names is not None else None
        self._shards = [os.path.join(path, shard["file"]) for shard in self.manifest["shards"]]
        for shard in self._shards:
            if not epath.Path(shard).exists():
                raise UserError(f"{shard}: this shard of the manifest is missing")
        self._open()

    def _open(self) -> None:
        from array_record.python import array_record_data_source

        self._records = array_record_data_source.ArrayRecordDataSource(self._shards)
        if len(self._records) != self.manifest["count"]:
            found, said = len(self._records), self.manifest["count"]
            raise UserError(f"{self.path}: {found} records where the manifest says {said}")

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Example:
        try:
            return decode_record(self._records[index])
        except Exception as error:  # whatever the reader raises for a damaged shard
            raise BadImage(f"record cannot be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


KINDS = {"arrayrecord": Kind(PackedSource)}
