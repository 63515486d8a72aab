"""Where images come from: one grammar, `open_source(spec)`, used wherever a data set is named.

    folder:PATH              class folders if sub-folders hold images, else flat and unlabeled
    list:FILE                one path a line, relative to the file's folder, then optionally a tab, comma or blank and a
                             whole-number label (or a tab and a class name); # starts a comment
    file:PATH                one image file, or those that a pattern such as photos/*.jpg matches
    arrays:FILE.npz          `images` uint8 [N, H, W] or [N, H, W, C] and optionally `labels` [N]; or a bare .npy stack
    scenes:SPLIT?size=N&seed=S&image_size=P        rendered images, nothing on disk
    arrayrecord:DIR          shards written by `dino-jax pack`
    tar:PATH                 a .tar file, a folder of them, or a pattern (* or {000..146}), as WebDataset writes them
    tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR&image=KEY&label=KEY]       TensorFlow Datasets, array_record format
    hf:NAME:SPLIT[?config=NAME&image=KEY&label=KEY]   Hugging Face `datasets`, or a folder written by save_to_disk

Each kind is in a module `data/*_source.py`. A bare path is auto-detected among the path kinds. Paths may be remote
(`gs://`, `s3://`: etils.epath). A source is picklable, and cheap to pickle: worker processes get copies.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import parse_qsl

from etils import epath

from dino_jax import data
from dino_jax.data.arrayrecord_source import MANIFEST
from dino_jax.data.example import Example, Kind
from dino_jax.data.folder_source import SUFFIXES
from dino_jax.data.storage import cause
from dino_jax.errors import UserError, did_you_mean


class Source(Protocol):
    """A finite, random-access collection of images."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None: unlabeled, or labeled by number only."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example at 0 <= index < len. Raises `BadImage` if it cannot be read."""


def open_source(spec: str) -> Source:
    """Opens the data set that `spec` names (grammar above). Raises `UserError` with the fix."""
    try:
        return _open(spec)
    except (OSError, RecursionError) as error:
        raise UserError(f"{spec}: cannot be opened: {cause(error)}") from error


def _open(spec: str) -> Source:
    prefix, rest, options = split_spec(spec)
    kind = kinds()[prefix]
    for key in options:
        if key not in kind.options:
            raise UserError(f"{spec}: {_unknown('option', key, kind.options)}")
    if not rest:
        raise UserError(f"{spec}: nothing after '{prefix}:'")
    source: Source = kind.open(rest, **options)
    if not len(source):
        raise UserError(f"{spec}: the data set is empty")
    return source


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind of source by its prefix: the `KINDS` of the modules `data/*_source.py`."""
    found: dict[str, Kind] = {}
    for module in pkgutil.iter_modules(data.__path__):
        if module.name.endswith("_source"):
            found |= importlib.import_module(f"{data.__name__}.{module.name}").KINDS
    return found


def split_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """'kind:rest?key=value' -> (kind, rest, {key: value}); the kind of a bare path is detected."""
    match = re.match(r"([A-Za-z_]\w*):(?!//)(.*)", spec, re.DOTALL)
    if match is None or os.path.exists(spec):
        return detect(spec), spec, {}
    kind, rest = match.groups()
    if kind not in kinds():
        raise UserError(f"{spec}: {_unknown('kind of source', kind, kinds())}")
    rest, _, query = rest.partition("?")
    try:
        return kind, rest, dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else ())
    except ValueError:
        raise UserError(f"{spec}: what follows '?' must read key=value&key=value") from None


def detect(path: str) -> str:
    """The kind of a bare path."""
    here = epath.Path(path)
    if here.is_dir():
        return "arrayrecord" if (here / MANIFEST).exists() else "folder"
    if here.suffix.lower() in SUFFIXES and here.suffix != ".npy" and (here.exists() or set(path) & set("*?[")):
        return "file"
    if not here.exists():
        raise UserError(f"{path}: no such file or folder (a source is a path or one of {', '.join(kinds())} and ':')")
    if here.suffix in (".npz", ".npy"):
        return "arrays"
    if here.suffix == ".tar":
        return "tar"
    if here.suffix.lower() in (".txt", ".csv", ".tsv", ".lst", ".list"):
        return "list"
    raise UserError(f"{path}: not a folder, a list (.txt) or arrays (.npz); say which kind, as in list:{path}")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    return f"unknown {what} {name!r} (known: {', '.join(names) or 'none'}){did_you_mean(name, names)}"
