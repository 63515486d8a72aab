"""Images in tar files, as WebDataset writes them."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

from dino_jax.data.decode import FILE_BYTES, BadImage
from dino_jax.data.example import Example, Kind
from dino_jax.data.folder_source import SUFFIXES, numbered
from dino_jax.data.left_out import SIDECARS, LeftOut
from dino_jax.data.storage import cause, is_remote, open_file
from dino_jax.errors import UserError, printable

LABEL_KEYS = ("label", "cls", "class")  # of .json members, the first that is there
LABEL_KINDS = (".cls", ".json", ".label", ".class")  # members that may hold a label; the first that does counts
LABEL_BYTES = 1 << 20
SHARDS = 1_000_000  # that braces may name
BESIDE = frozenset(  # parts of names such as 0001.seg.png: images that accompany the sample's image
    (
        *("seg", "segmentation", "semantic", "instance", "mask", "masks", "label", "labels", "annotation", "gt"),
        *("depth", "normal", "normals", "edge", "edges", "flow", "disparity", "heatmap", "alpha", "thumb"),
        *("thumbnail", "preview"),
    )
)

_log = logging.getLogger(__name__)


class TarSource:
    """Uncompressed tar files: members of one example agree up to the first dot of the last part of their names.

    Each image is one example, with these exceptions. `0001.seg.png` beside `0001.jpg`, and an image whose name holds a
    word of `BESIDE` beside another, only accompany it. Names with dots, such as `img.0001.jpg` and `img.0002.jpg`, are
    examples of their own. The label is a member `.cls` (`.label`, `.class`) with a number or a class name, or a `.json`
    with `label`, `cls` or `class`, whose name agrees with the image's up to the last dot, else up to the first.

    What is left out is counted in `left_out` and a warning; if it is more than what is read, it is an error. `spec`
    is a tar file, a folder of them, or a pattern with `*` or `{000..146}`. The headers are read once, at the start;
    images are then read at random.
    """

    def __init__(self, spec: str):
        self.paths = _paths(spec)
        left, lost, names, labels, places = LeftOut(), 0, [], [], []
        for number, path in enumerate(self.paths):
            shard = _read_shard(path)
            lost += shard.leave_out(left)
            for member, label in shard.examples():
                names.append(member.name)
                labels.append(label)
                places.append((number, member.offset, member.size))
        self.left_out = left.text()
        if not names or lost > len(names):
            found = left.text(everything=True) or "nothing"
            raise UserError(
                f"{spec}: {len(names) or 'no'} images in it but {found}; convert them to JPEG or PNG, and give the "
                f"members one of the suffixes {' '.join(SUFFIXES)}"
            )
        if self.left_out:
            _log.warning("%s: left out: %s", spec, self.left_out)
        numbers, class_names = numbered(spec, labels)
        self.class_names = tuple(class_names) if class_names is not None else None
        self._names = np.array([os.fsencode(name) for name in names], np.bytes_)
        self._labels = np.array(numbers, np.int32)
        self._places = np.array(places, np.int64).reshape(-1, 3)  # tar, offset, bytes

    @property
    def listing(self) -> tuple[np.ndarray, ...]:
        """Names and labels of all images (see `identity`)."""
        return self._names, self._labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = printable(os.fsdecode(bytes(self._names[index])))
        number, offset, size = map(int, self._places[index])
        try:
            if offset < 0 or size > FILE_BYTES:
                raise BadImage("a sparse member of a tar" if offset < 0 else f"more than {FILE_BYTES >> 20} MiB")
            with open_file(self.paths[number]) as file:
                file.seek(offset)
                image = file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {cause(error)}") from error
        except BadImage as error:
            error.name = name
            raise
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
    if int(last) - int(first) >= SHARDS:
        raise UserError(f"tar:{spec}: names more than {SHARDS} files")
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


class _Member(NamedTuple):
    """A file in a tar. `sample`: its name up to the first dot; `part`: what is between that and the last dot."""

    name: str
    sample: str
    part: str
    kind: str  # the last suffix, in lower case
    offset: int  # of its bytes; -1: sparse, it is not read
    size: int

    @property
    def stem(self) -> str:
        """The name up to the last dot."""
        return f"{self.sample}.{self.part}" if self.part else self.sample


class _Shard:
    """The members of a tar that matter, in its order."""

    def __init__(self) -> None:
        self.images: dict[str, _Member] = {}  # by name: of two with one name the later counts, as for `tar`
        self.labels: dict[str, dict[str, str]] = {}  # stem -> kind -> label as written
        self.others: list[_Member] = []

    def examples(self) -> Iterator[tuple[_Member, str]]:
        """The image of each example, and its label or ''."""
        beside = self._beside()
        for member in self.images.values():
            if member.name not in beside:
                yield member, self._label(member.stem) or self._label(member.sample)

    def leave_out(self, left: LeftOut) -> int:
        """Counts what is not an example; returns how many of those have no image beside them."""
        beside = self._beside()
        for name, member in self.images.items():
            if name in beside:
                left.add(name, f".{member.part}{member.kind}")
        for member in self.others:
            left.add(member.name, member.kind)
        stems = {member.stem for member in self.images.values()}
        samples = stems | {member.sample for member in self.images.values()}
        return len(
            {
                other.stem
                for other in self.others
                if other.kind not in SIDECARS and other.stem not in samples and other.sample not in stems
            }
        )

    def _label(self, key: str) -> str:
        found = self.labels.get(key, {})
        return next((found[kind] for kind in LABEL_KINDS if found.get(kind)), "")

    def _beside(self) -> set[str]:
        """The names of images that accompany another."""
        samples: dict[str, list[_Member]] = {}
        for member in self.images.values():
            samples.setdefault(member.sample, []).append(member)
        beside = set()
        for members in samples.values():
            plain = any(not member.part for member in members)
            words = [member for member in members if member.part and _is_word(member.part, plain)]
            if len(words) < len(members):
                beside |= {member.name for member in words}
        return beside


def _is_word(part: str, plain: bool) -> bool:
    """Whether `part` says what an image shows; otherwise it belongs to the name, as in img.0001.jpg.

    `plain`: the sample has an image without such a part, and so any word tells.
    """
    return any(word in BESIDE for word in re.split(r"[^a-z]+", part.lower())) or (plain and part.isalpha())


def _read_shard(path: str) -> _Shard:
    """Reads the headers and labels of a tar file."""
    shard = _Shard()
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                if not info.isfile() or base.startswith("."):
                    continue
                if info.size < 0:
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                stem, _, suffix = base.partition(".")
                part, _, kind = suffix.rpartition(".")
                offset = -1 if info.issparse() else info.offset_data
                kind = f".{kind.lower()}" if suffix else ""
                member = _Member(info.name, f"{folder}/{stem}", part, kind, offset, info.size)
                if kind in SUFFIXES:
                    shard.images[info.name] = member
                elif kind in LABEL_KINDS:
                    shard.labels.setdefault(member.stem, {})[kind] = _label(path, member, file)
                else:
                    shard.others.append(member)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from error
    except (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, MemoryError) as error:
        hint = "compressed? gunzip it first" if _compressed(path) else "damaged or cut off? get it again"
        raise UserError(f"{path}: cannot be read as a tar file ({cause(error)}): {hint}") from error
    return shard


def _label(path: str, member: _Member, file: BinaryIO) -> str:
    """The label in a member, as text; '' if there is none."""
    where = f"{path}: {printable(member.name)}"
    if member.offset < 0 or member.size > LABEL_BYTES:
        raise UserError(f"{where}: not a label: {'sparse' if member.offset < 0 else f'{member.size} bytes'}")
    file.seek(member.offset)
    try:
        text = file.read(member.size).decode()
        if member.kind != ".json":
            return text.strip()
        about: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        if member.kind in (".label", ".class"):  # may as well hold a mask
            return ""
        raise UserError(f"{where}: not a label: {cause(error)}") from error
    return next((str(about[key]) for key in LABEL_KEYS if key in about), "") if isinstance(about, dict) else ""


def _compressed(path: str) -> bool:
    with open_file(path) as file:
        return file.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")


KINDS = {"tar": Kind(TarSource)}
