"""Images in tar files, as WebDataset writes them."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage
from dino_jax.data.example import Example, Kind
from dino_jax.data.folder_source import SUFFIXES, numbered
from dino_jax.data.storage import is_remote
from dino_jax.errors import UserError, printable

LABEL_KEYS = ("label", "cls", "class")  # of .json members, the first that is there


class TarSource:
    """Uncompressed tar files: members whose names agree up to the first dot of the last part make one example.

    It has one image and optionally a label: a `.cls` member with a number or a class name, or a `.json` member with
    `label`, `cls` or `class`. `spec` is a tar file, a folder of them, or a pattern with `*` or `{000..146}`. The
    headers are read once, at the start; images are then read at random.
    """

    def __init__(self, spec: str):
        self.paths = _paths(spec)
        names, labels, places = [], [], []
        for number, path in enumerate(self.paths):
            for name, label, offset, size in _examples(path):
                names.append(name)
                labels.append(label)
                places.append((number, offset, size))
        numbers, class_names = numbered(spec, labels)
        self.class_names = tuple(class_names) if class_names is not None else None
        self._names = np.array([os.fsencode(name) for name in names], np.bytes_)
        self._labels = np.array(numbers, np.int32)
        self._places = np.array(places, np.int64).reshape(-1, 3)  # tar, offset, bytes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = printable(os.fsdecode(bytes(self._names[index])))
        number, offset, size = map(int, self._places[index])
        try:
            with _open(self.paths[number]) as file:
                file.seek(offset)
                image = file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        return Example(image, int(self._labels[index]), name)


def _paths(spec: str) -> list[str]:
    """The tar files that a file, a folder or a pattern names, in order."""
    paths = [path for expanded in _braces(spec) for path in _matches(expanded)]
    if not paths:
        raise UserError(f"tar:{spec}: no such tar file")
    return paths


def _braces(spec: str) -> list[str]:
    """'a{08..10}' -> ['a08', 'a09', 'a10']."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if match is None:
        return [spec]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [one for number in numbers for one in _braces(spec[: match.start()] + number + spec[match.end() :])]


def _matches(spec: str) -> list[str]:
    here = epath.Path(spec)
    if here.is_dir():
        return sorted(str(path) for path in here.iterdir() if path.suffix == ".tar")
    if here.exists():
        return [spec]
    if "*" not in spec:
        raise UserError(f"{spec}: no such tar file")
    return sorted(str(path) for path in here.parent.glob(here.name)) if is_remote(spec) else sorted(glob.glob(spec))


def _open(path: str) -> BinaryIO:
    return epath.Path(path).open("rb") if is_remote(path) else open(path, "rb")


def _examples(path: str) -> Iterator[tuple[str, str, int, int]]:
    """Name of the image, label as written or '', and where its bytes are: offset and size."""
    images: dict[str, tuple[str, int, int]] = {}  # by the examples' keys, in the order of the tar
    labels: dict[str, str] = {}
    try:
        with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, kind = f"{folder}/{stem}", "." + suffix.rpartition(".")[2].lower()
                if not member.isfile() or base.startswith("."):
                    continue
                if kind in SUFFIXES and key not in images:
                    images[key] = member.name, member.offset_data, member.size
                elif kind in (".cls", ".json"):
                    data = tar.extractfile(member)
                    labels[key] = _label(path, member.name, data.read() if data else b"") or labels.get(key, "")
    except (tarfile.TarError, EOFError) as error:
        hint = "compressed? gunzip it first" if _compressed(path) else "damaged or cut off? get it again"
        raise UserError(f"{path}: cannot be read as a tar file ({error}): {hint}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    for key, (name, offset, size) in images.items():
        yield name, labels.get(key, ""), offset, size


def _label(path: str, name: str, data: bytes) -> str:
    """The label in a .cls or .json member, as text; '' if there is none."""
    try:
        text = data.decode()
        if not name.lower().endswith(".json"):
            return text.strip()
        about: Any = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: {name}: not a label: {error}") from error
    return next((str(about[key]) for key in LABEL_KEYS if key in about), "") if isinstance(about, dict) else ""


def _compressed(path: str) -> bool:
    with _open(path) as file:
        return file.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")


KINDS = {"tar": Kind(TarSource)}
