"""Images in memory, or in one .npz or .npy file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import numpy as np
from etils import epath

from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.data.storage import is_remote
from dino_jax.errors import UserError


class ArraySource:
    """Images in an array [N, H, W] or [N, H, W, C], with optional labels [N]."""

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ):
        _check("images", images, labels)
        self.images = images
        self.labels = None if labels is None else whole_labels(labels, "labels")
        self.class_names = tuple(class_names) if class_names is not None else None

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
        super().__init__(images, labels, class_names)

    def __reduce__(self):
        return FileArraySource, (self.path,)


def open_arrays(path: str) -> ArraySource:
    """Opens `FILE.npz` (`images`, optional `labels` and `class_names`) or `FILE.npy` (images alone)."""
    if not epath.Path(path).exists():
        raise UserError(f"{path}: no such file")
    return FileArraySource(path)


def _load(path: str) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    try:
        if path.endswith(".npy"):
            return _load_npy(path), None, None
        with np.load(epath.Path(path).open("rb"), allow_pickle=False) as file:
            if "images" not in file.files:
                raise UserError(f"{path}: no array 'images' in it (it has {', '.join(file.files) or 'none'})")
            labels = file["labels"].reshape(-1) if "labels" in file.files else None
            names = file["class_names"].tolist() if "class_names" in file.files else None
            images = _map_member(path, "images.npy")
            images = file["images"] if images is None else images
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as arrays: {error}") from error
    _check(f"{path}: images", images, labels)
    return images, labels, names


def _load_npy(path: str) -> np.ndarray:
    if not is_remote(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with epath.Path(path).open("rb") as file:
        return np.load(file, allow_pickle=False)


def _map_member(path: str, member: str) -> np.ndarray | None:
    """Maps an array of a local, uncompressed .npz into memory without reading it; None if that is impossible."""
    if is_remote(path):
        return None
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(info.header_offset + 26)  # lengths of name and extra field in the member's own header
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(info.header_offset + 30 + lengths.sum()))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _check(what: str, images: np.ndarray, labels: Sequence[int] | np.ndarray | None) -> None:
    if images.ndim not in (3, 4):
        raise UserError(f"{what} must be [N, H, W] or [N, H, W, C], not of shape {images.shape}")
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{what}: {len(images)} of them but {len(labels)} labels")
    if labels is not None:
        whole_labels(labels, what)


KINDS = {"arrays": Kind(open_arrays)}
