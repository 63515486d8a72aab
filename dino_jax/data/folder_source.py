"""Images in files: a folder tree, or a text list of paths."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage, read_bytes
from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.data.storage import is_remote
from dino_jax.errors import UserError, printable

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".gif"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"),
)

_log = logging.getLogger(__name__)


class Files:
    """Images by path under one root, with labels. Kept as arrays, so that a million names pickle quickly."""

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int], class_names: Sequence[str] | None):
        self.root = root
        self.class_names = tuple(class_names) if class_names is not None else None
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._labels = np.array(labels, dtype=np.int32)

    @property
    def labels(self) -> np.ndarray:
        """The label of each image, int32 [N]; -1: unlabeled."""
        return self._labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = os.fsdecode(bytes(self._names[index]))
        try:
            return Example(read_bytes(join(self.root, name)), int(self._labels[index]), printable(name))
        except BadImage as error:
            error.name = printable(name)
            raise


class FolderSource(Files):
    """A tree of class folders, or a flat folder of unlabeled images.

    If sub-folders hold images (at any depth), each sub-folder is a class, numbered in sorted order as in
    torchvision's ImageFolder, empty ones included; images next to the class folders are skipped with a warning. Names
    that start with a dot are skipped, links are followed, and a broken link is an image that cannot be read.
    """

    def __init__(self, path: str):
        root = epath.Path(path)
        if not root.exists():
            raise UserError(f"{path}: no such folder")
        if not root.is_dir():
            raise UserError(f"{path}: not a folder; a list of paths is opened with list:{path}")
        folders, flat = _entries(str(path))
        above = (os.path.realpath(path),)
        classes = {folder: sorted(_walk(join(str(path), folder), folder, above)) for folder in sorted(folders)}
        names = [name for found in classes.values() for name in found]
        if names:
            labels = [label for label, found in enumerate(classes.values()) for _ in found]
            self._notice(str(path), flat, [name for name, found in classes.items() if not found])
            super().__init__(str(path), names, labels, list(classes))
        elif flat:
            super().__init__(str(path), sorted(flat), [-1] * len(flat), None)
        else:
            empty = not folders and not any(root.iterdir())
            what = "the folder is empty" if empty else f"no images in it ({' '.join(SUFFIXES)})"
            raise UserError(f"{path}: {what}; put images there or name another folder")

    @staticmethod
    def _notice(path: str, flat: list[str], empty: list[str]) -> None:
        if flat:
            _log.warning("%s: %d images next to the class folders are skipped", path, len(flat))
        if empty:
            _log.warning("%s: no images in %d class folders, such as %s", path, len(empty), empty[0])


class ListSource(Files):
    """A text file of paths with optional labels; the grammar is in `sources`. Labels are for every line or for none."""

    def __init__(self, path: str):
        file = epath.Path(path)
        if not file.exists() or file.is_dir():
            raise UserError(f"{path}: no such list file")
        lines = [line.strip() for line in file.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")]
        entries = [_entry(line) for line in lines if line and not line.startswith("#")]
        if not entries:
            raise UserError(f"{path}: the list names no images")
        names, labels = zip(*entries, strict=True)
        root = str(file.parent)
        self._require(path, root, names)
        super().__init__(root, names, *numbered(path, labels))

    @staticmethod
    def _require(path: str, root: str, names: Sequence[str]) -> None:
        if is_remote(root):
            return  # one request per file would be too slow; reading reports it
        missing = [name for name in names if not is_remote(name) and not os.path.lexists(join(root, name))]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(names)} files are missing, first {printable(missing[0])} "
                f"(paths are relative to {root})"
            )


def _entry(line: str) -> tuple[str, str]:
    """A line of a list to (path, label or '')."""
    if "\t" in line:
        name, label = line.rsplit("\t", 1)
        return name.strip(), label.strip()
    match = re.fullmatch(r"(.*[^\s,])\s*[,\s]\s*(-?\d+)", line)
    return (match[1], match[2]) if match else (line, "")


def numbered(path: str, labels: Sequence[str]) -> tuple[list[int], list[str] | None]:
    """Labels as written to numbers; names are numbered in sorted order."""
    if not any(labels):
        return [-1] * len(labels), None
    if not all(labels):
        raise UserError(f"{path}: {labels.count('')} of {len(labels)} images have no label; label all of them or none")
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return whole_labels([int(label) for label in labels], path).tolist(), None
    names = sorted(set(labels))
    number = {name: k for k, name in enumerate(names)}
    return [number[label] for label in labels], names


def _walk(path: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Names of all images below `path`, each starting with `prefix`; links to a folder above are not followed."""
    here = os.path.realpath(path)
    if here in above:
        return
    folders, names = _entries(path)
    for name in names:
        yield f"{prefix}/{name}"
    for folder in folders:
        yield from _walk(join(path, folder), f"{prefix}/{folder}", (*above, here))


def _entries(path: str) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the images in a folder, without hidden ones."""
    folders, names = [], []
    if is_remote(path):  # is_dir is a request: skipped for names of images
        found = ((entry.name, entry.is_dir) for entry in epath.Path(path).iterdir())
    else:
        found = ((entry.name, entry.is_dir) for entry in os.scandir(path))
    for name, is_folder in found:
        if name.startswith("."):
            continue
        if os.path.splitext(name)[1].lower() in SUFFIXES and (is_remote(path) or not is_folder()):
            names.append(name)
        elif is_folder():
            folders.append(name)
    return folders, names


def join(root: str, name: str) -> str:
    """`name` under `root`, unless it is absolute or a URL itself."""
    return name if is_remote(name) else os.path.join(root, name)


def open_files(pattern: str) -> Files:
    """One image file, or those that a pattern with `*`, `?` or `[...]` matches, without labels.

    Raises:
      UserError: no file matches.
    """
    root = os.path.dirname(pattern)
    found = glob.glob(pattern) if any(sign in pattern for sign in "*?[") else [pattern]
    names = sorted(name for name in found if os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.isdir(name))
    if not names:
        raise UserError(f"{pattern}: no image file matches it ({' '.join(SUFFIXES)})")
    return Files(root, [os.path.relpath(name, root or ".") for name in names], [-1] * len(names), None)


KINDS = {"folder": Kind(FolderSource), "list": Kind(ListSource), "file": Kind(open_files)}
