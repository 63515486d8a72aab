"""Images in memory, or in one .npz or .npy file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from typing import BinaryIO, Literal

import numpy as np
from etils import epath

from dino_jax.data.decode import npy_header
from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.data.storage import cause, is_remote, open_file
from dino_jax.errors import UserError, printable

LARGE, RATIO = 1 << 30, 100  # a member that expands beyond LARGE bytes by more than RATIO is refused


class ArraySource:
    """Images in an array [N, H, W] or [N, H, W, C], with optional labels [N]."""

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        where: str = "images",
    ):
        if images.ndim not in (3, 4):
            raise UserError(f"{where} must be [N, H, W] or [N, H, W, C], not of shape {images.shape}")
        if labels is not None and np.shape(labels) != images.shape[:1]:
            raise UserError(f"{where}: {len(images)} of them but {np.size(labels)} labels")
        self.images = images
        self.labels = None if labels is None else whole_labels(labels, where)
        self.class_names = tuple(class_names) if class_names is not None else None

    @property
    def listing(self) -> tuple[np.ndarray, ...]:
        """All labels (see `identity`)."""
        return () if self.labels is None else (self.labels,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        label = -1 if self.labels is None else int(self.labels[index])
        return Example(np.asarray(self.images[index]), label, f"{index:06d}")


class FileArraySource(ArraySource):
    """`ArraySource` from a file. Worker processes read the file themselves; uncompressed files are mapped."""

    def __init__(self, path: str):
        self.path = path
        images, labels, class_names = _load(path)
        super().__init__(images, labels, class_names, f"{path}: images")

    def __reduce__(self):
        return FileArraySource, (self.path,)


def open_arrays(path: str) -> ArraySource:
    """Opens `FILE.npz` (`images`, optional `labels` and `class_names`) or `FILE.npy` (images alone)."""
    if not epath.Path(path).exists():
        raise UserError(f"{path}: no such file")
    return FileArraySource(path)


def _load(path: str) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Images, labels and class names of a file. Every header is checked before anything is mapped or allocated."""
    try:
        with open_file(path) as file:
            if path.endswith(".npy"):
                return _map(path, file, epath.Path(path).stat().length), None, None
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                if "images.npy" not in members:
                    found = ", ".join(printable(name.removesuffix(".npy")) for name in members)
                    raise UserError(f"{path}: no array 'images' in it (it has {found or 'none'})")
                images = _member(path, archive, members["images.npy"], mapped=True)
                labels = _member(path, archive, members["labels.npy"]) if "labels.npy" in members else None
                names = _member(path, archive, members["class_names.npy"]) if "class_names.npy" in members else None
    except UserError:
        raise
    except Exception as error:  # damaged archives raise nearly anything inside zipfile
        raise UserError(f"{path}: cannot be read as arrays: {cause(error)}") from error
    labels = None if labels is None else labels.reshape(-1)
    return images, labels, None if names is None else [str(name) for name in names.reshape(-1)]


def _member(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, mapped: bool = False) -> np.ndarray:
    """An array of an .npz; with `mapped` not read but mapped into memory, if it is in a local file, uncompressed."""
    name = info.filename.removesuffix(".npy")
    if info.file_size > LARGE and info.file_size > RATIO * info.compress_size:
        raise ValueError(f"{name} would expand from {info.compress_size} bytes to {info.file_size}: use np.savez")
    if mapped and info.compress_type == zipfile.ZIP_STORED and not is_remote(path):
        with open_file(path) as file:
            file.seek(info.header_offset + 26)  # lengths of name and extra field in the member's own header
            lengths = np.frombuffer(file.read(4), "<u2")
            begin = int(info.header_offset + 30 + lengths.sum())
            file.seek(begin)
            return _map(path, file, begin + info.file_size)
    with archive.open(info) as member:
        shape, fortran, dtype = npy_header(member, kinds="biufUS")
        needed = math.prod(shape) * dtype.itemsize
        if needed > info.file_size:
            raise ValueError(f"{name} has {info.file_size} bytes where its shape {shape} needs {needed}")
        data = member.read(needed)
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def _map(path: str, file: BinaryIO, end: int) -> np.ndarray:
    """The array whose .npy header begins where `file` stands: mapped into memory, or read if it is remote."""
    shape, fortran, dtype = npy_header(file)
    begin, needed = file.tell(), math.prod(shape) * dtype.itemsize
    if needed > end - begin:
        raise ValueError(f"cut off: {end - begin} bytes where the shape {shape} needs {needed}")
    order: Literal["F", "C"] = "F" if fortran else "C"
    if is_remote(path) or not needed:
        return np.ndarray(shape, dtype, file.read(needed), order=order)
    return np.memmap(path, dtype, "r", begin, shape, order)


KINDS = {"arrays": Kind(open_arrays)}
