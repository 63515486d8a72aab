"""Images in files: a folder tree, or a text list of paths."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from dino_jax.data.decode import BadImage, read_bytes
from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.data.left_out import LeftOut
from dino_jax.data.storage import cause, is_remote, read_file
from dino_jax.errors import UserError, printable

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".gif"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"),
)

_log = logging.getLogger(__name__)


class Files:
    """Images by path under one root, with labels. Kept as arrays, so that a million names pickle quickly."""

    left_out = ""  # the files that are not read for their suffix, in words

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int], class_names: Sequence[str] | None):
        self.root = root
        self.class_names = tuple(class_names) if class_names is not None else None
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._labels = np.array(labels, dtype=np.int32)

    @property
    def labels(self) -> np.ndarray:
        """The label of each image, int32 [N]; -1: unlabeled."""
        return self._labels

    @property
    def listing(self) -> tuple[np.ndarray, ...]:
        """Names and labels of all images (see `identity`)."""
        return self._names, self._labels

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
    that start with a dot are skipped, links are followed, and a broken link is an image that cannot be read. Files
    with other suffixes than `SUFFIXES` are counted in `left_out`; folders that cannot be read are named in a warning.
    """

    def __init__(self, path: str):
        root = epath.Path(path)
        if not root.exists():
            raise UserError(f"{path}: no such folder")
        if not root.is_dir():
            raise UserError(f"{path}: not a folder; a list of paths is opened with list:{path}")
        scan = _Scan()
        folders, flat = scan.entries(str(path), "")
        above = (os.path.realpath(path),)
        classes = {folder: sorted(scan.walk(join(str(path), folder), folder, above)) for folder in sorted(folders)}
        names = [name for found in classes.values() for name in found]
        if not names and not flat:
            raise UserError(f"{path}: {scan.why_empty()}")
        self._notice(str(path), flat if names else [], [name for name, found in classes.items() if names and not found])
        if names:
            labels = [label for label, found in enumerate(classes.values()) for _ in found]
            super().__init__(str(path), names, labels, list(classes))
        else:
            super().__init__(str(path), sorted(flat), [-1] * len(flat), None)
        scan.warn(str(path))
        self.left_out = scan.left.text()

    @staticmethod
    def _notice(path: str, flat: list[str], empty: list[str]) -> None:
        if flat:
            _log.warning("%s: %d images next to the class folders are skipped", path, len(flat))
        if empty:
            _log.warning("%s: no images in %d class folders, such as %s", path, len(empty), printable(empty[0]))


class _Scan:
    """A walk over a tree of folders, and what it left out."""

    def __init__(self) -> None:
        self.left = LeftOut()
        self.shut: list[str] = []  # folders that cannot be read, with the reason

    def walk(self, path: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        """Names of all images below `path`, each starting with `prefix`; links to a folder above are not followed."""
        here = os.path.realpath(path)
        if here in above:
            return
        folders, names = self.entries(path, f"{prefix}/")
        for name in names:
            yield f"{prefix}/{name}"
        for folder in folders:
            yield from self.walk(join(path, folder), f"{prefix}/{folder}", (*above, here))

    def entries(self, path: str, prefix: str) -> tuple[list[str], list[str]]:
        """Names of the sub-folders and of the images in a folder, without hidden ones."""
        folders: list[str] = []
        names: list[str] = []
        try:  # of a bucket, is_dir is a request: skipped for names of images
            found = list(epath.Path(path).iterdir() if is_remote(path) else os.scandir(path))
        except OSError as error:
            self.shut.append(f"{printable(prefix or path)} ({cause(error)})")
            return folders, names
        for entry in found:
            name = entry.name
            if name.startswith("."):
                continue
            image = os.path.splitext(name)[1].lower() in SUFFIXES
            if not (image and is_remote(path)) and _is_folder(entry):
                folders.append(name)
            elif image:
                names.append(name)
            else:
                self.left.add(prefix + name)
        return folders, names

    def warn(self, path: str) -> None:
        """Logs what was left out."""
        if self.shut:
            more = f" and {len(self.shut) - 1} more folders" if len(self.shut) > 1 else ""
            _log.warning("%s: cannot be read and left out: %s%s", path, self.shut[0], more)
        warn_left_out(path, self.left)

    def why_empty(self) -> str:
        """The error for a folder without images."""
        if self.shut:
            return f"cannot be read: {self.shut[0]}"
        if left := self.left.text(everything=True):
            return f"no images in it but {left}: convert them to JPEG or PNG; put images there or name another folder"
        return "the folder is empty; put images there or name another folder"


def _is_folder(entry: Any) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a loop of links
        return False


def warn_left_out(where: str, left: LeftOut) -> None:
    """Logs the files that a source does not read, if there are any."""
    if text := left.text():
        _log.warning("%s: left out for their suffix: %s; to use them, convert them to JPEG or PNG", where, text)


class ListSource(Files):
    """A text file of paths with optional labels; the grammar is in `sources`. Labels are for every line or for none."""

    def __init__(self, path: str):
        file = epath.Path(path)
        if not file.exists() or file.is_dir():
            raise UserError(f"{path}: no such list file")
        text = read_file(path).decode("utf-8-sig", "surrogateescape")
        lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
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
        missing = [name for name in names if not is_remote(name) and not _exists(join(root, name))]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(names)} files are missing, first {printable(missing[0])} "
                f"(paths are relative to {root})"
            )


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the name
        return False


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


def join(root: str, name: str) -> str:
    """`name` under `root`, unless it is absolute or a URL itself."""
    return name if is_remote(name) else os.path.join(root, name)


def open_files(pattern: str) -> Files:
    """One image file, or those that a pattern with `*`, `?` or `[...]` matches, without labels.

    Raises:
      UserError: no file matches.
    """
    root, many = os.path.dirname(pattern), any(sign in pattern for sign in "*?[") and not os.path.lexists(pattern)
    found, left = sorted(glob.glob(pattern)) if many else [pattern] * os.path.lexists(pattern), LeftOut()
    names = []
    for name in found:
        if os.path.splitext(name)[1].lower() not in SUFFIXES and many:
            left.add(name)
        elif not os.path.isdir(name):
            names.append(name)
    if not names:
        what = f"matches no image file but {left.text(everything=True)}" if left.text(everything=True) else ""
        raise UserError(f"{pattern}: {what or 'no image file matches it'} ({' '.join(SUFFIXES)})")
    warn_left_out(pattern, left)
    source = Files(root, [os.path.relpath(name, root or ".") for name in names], [-1] * len(names), None)
    source.left_out = left.text()
    return source


KINDS = {"folder": Kind(FolderSource), "list": Kind(ListSource), "file": Kind(open_files)}
