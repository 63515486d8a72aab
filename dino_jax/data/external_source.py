"""Data sets of other libraries: TensorFlow Datasets (without TensorFlow) and Hugging Face `datasets` (an extra)."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import numpy as np

from dino_jax.data.decode import BadImage, read_bytes
from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.errors import UserError, did_you_mean, printable

_log = logging.getLogger(__name__)


class TfdsSource:
    """A prepared data set of TensorFlow Datasets, read at random through `tfds.data_source`.

    `spec` is NAME[/CONFIG][:VERSION]:SPLIT; the split may be a slice such as train[:10%]. The files must be in the
    array_record format (`tfds build NAME --file_format=array_record`). Images stay encoded.
    """

    def __init__(self, spec: str, data_dir: str | None = None, image: str = "image", label: str = "label"):
        import tensorflow_datasets as tfds

        self._arguments = (spec, data_dir, image, label)
        name, self.split = split_name("tfds", spec)
        self.image, self.label = image, label
        self.where = f"tfds:{spec}"
        builder = self._builder(tfds, name, data_dir)
        features = dict(builder.info.features.items())
        if not isinstance(features.get(image), tfds.features.Image):
            raise UserError(f"{self.where}: no image {image!r} in {', '.join(features)}; say which: ?image=KEY")
        if label not in features and label != "label":
            raise UserError(f"{self.where}: no {label!r} in {', '.join(features)}")
        self.class_names = tuple(getattr(features.get(label), "names", None) or ()) or None
        if label in features and (features[label].shape or not np.issubdtype(features[label].np_dtype, np.integer)):
            _log.warning("%s: %r is not one class for an image; the images are unlabeled", self.where, label)
            self.label = ""
        try:
            self._rows = builder.as_data_source(self.split, decoders={image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(f"{self.where}: not array_record; rebuild it with --file_format=array_record") from error
        except ValueError as error:
            raise UserError(f"{self.where}: {_line(error)} (splits: {', '.join(builder.info.splits)})") from error

    def _builder(self, tfds: Any, name: str, data_dir: str | None) -> Any:
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # unknown names, versions and configs: each its own type
            known = tfds.list_builders(with_community_datasets=False)
            hint = did_you_mean(re.split("[/:]", name)[0], known)
            raise UserError(f"{self.where}: {_line(error)}{hint}") from error
        if not builder.is_prepared():
            raise UserError(
                f"{self.where}: not prepared in {data_dir or 'the default data_dir'}; "
                f"run `tfds build {name} --file_format=array_record`, or say where it is: ?data_dir=DIR"
            )
        return builder

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        try:
            row = self._rows[index]
        except Exception as error:  # whatever the reader raises for a damaged record
            raise BadImage(f"record cannot be read: {_line(error)}") from error
        name = row.get("file_name", f"{self.split}-{index:07d}")
        name = name if isinstance(name, str) else name.decode(errors="surrogateescape")
        label = int(whole_labels(row.get(self.label, -1), f"{self.where}, row {index}"))
        return Example(row[self.image], label, printable(name))


class HfSource:
    """A data set of Hugging Face `datasets`: by name, a folder that `load_dataset` reads, or one of `save_to_disk`.

    Images stay encoded. Labels are numbers or words; a missing one is -1. If the label column that was not asked for
    by name cannot be one of classes, the images are unlabeled, with a warning: training needs no labels.
    """

    def __init__(self, spec: str, config: str | None = None, image: str | None = None, label: str | None = None):
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"hf:{spec}: needs the package datasets; pip install 'dino-jax[hf]'") from error
        self.where = f"hf:{spec}"
        name, self.split = split_name("hf", spec)
        rows = self._load(datasets, name, config)
        images = {column: _is_image(datasets, feature) for column, feature in rows.features.items()}
        self.image = self._column(image, "image", [column for column, whether in images.items() if whether])
        if not images.get(self.image):
            raise UserError(f"{self.where}: no image {self.image!r} in {', '.join(rows.features)}; say ?image=KEY")
        named = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        self.label = self._column(label, "label", named)
        if label and label not in rows.features:
            raise UserError(f"{self.where}: no {label!r} in {', '.join(rows.features)}")
        self.labels, names = np.full(len(rows), -1, np.int32), None
        if self.label in rows.features:
            try:
                self.labels, names = _classes(rows, self.label, self.where)
            except UserError as error:
                if label:
                    raise
                _log.warning("%s; the images are unlabeled, or say another column: ?label=KEY", error)
        self.class_names = tuple(names) if names else None
        self._rows = rows.cast_column(self.image, datasets.Image(decode=False))

    def _load(self, datasets: Any, name: str, config: str | None) -> Any:
        try:
            saved = os.path.isdir(name) and {"dataset_info.json", "dataset_dict.json"} & set(os.listdir(name))
            if saved:
                loaded = datasets.load_from_disk(name)
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(name, config, split=self.split)
        except KeyError as error:
            raise UserError(f"{self.where}: no split {self.split!r} (splits: {', '.join(loaded)})") from error
        except Exception as error:  # missing names, no network, unknown configs: each its own type
            raise UserError(f"{self.where}: {_line(error)}") from error

    def _column(self, asked: str | None, default: str, found: list[str]) -> str:
        """The column to use: the one asked for, else the only one of its kind, else the default."""
        if asked or default in found or not found:
            return asked or default
        if len(found) > 1:
            raise UserError(f"{self.where}: {default}s in {', '.join(found)}: say which: ?{default}={found[0]}")
        return found[0]

    @property
    def listing(self) -> tuple[np.ndarray, ...]:
        """All labels (see `identity`)."""
        return (self.labels,)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        name = f"{self.split}-{index:07d}"
        try:
            image = self._rows[index][self.image]
            if image is None or image["bytes"] is None is image["path"]:
                raise BadImage("there is no image in this row")
            name = printable(os.path.basename(image["path"] or "")) or name
            data = read_bytes(image["path"]) if image["bytes"] is None else image["bytes"]
        except BadImage as error:
            error.name = name
            raise
        except Exception as error:  # whatever the reader raises for a damaged file
            bad = BadImage(f"row cannot be read: {_line(error)}")
            bad.name = name
            raise bad from error
        return Example(data, int(self.labels[index]), name)


def _is_image(datasets: Any, feature: Any) -> bool:
    """Whether a column holds images: of that type, or as the bytes that the type is stored as."""
    if isinstance(feature, dict):
        return {"bytes", "path"} == feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _classes(rows: Any, column: str, where: str) -> tuple[np.ndarray, list[str] | None]:
    """The labels of a column, int32 [N], and the names of the classes, if it has names."""
    feature, values = rows.features[column], list(rows[column])
    where = f"{where}, column {column}"
    names = getattr(feature, "names", None)
    if getattr(feature, "dtype", None) in ("string", "large_string") and not names:
        names = sorted({name for name in values if name is not None})
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers.get(name, -1) for name in values]
    if any(isinstance(value, list | tuple | dict | str | bytes) for value in values):
        raise UserError(f"{where}: {getattr(feature, 'dtype', feature)} is not one class for an image")
    missing = [value is None or value != value for value in values]  # NaN is missing too
    return whole_labels([-1 if gone else value for gone, value in zip(missing, values, strict=True)], where), names


def split_name(kind: str, spec: str) -> tuple[str, str]:
    """'NAME:SPLIT' -> (NAME, SPLIT); colons within NAME (a version) or the split's brackets do not count."""
    match = re.fullmatch(r"(.+?):([^:/\[\]]+(?:\[[^\]]*\])?(?:\+[^:/\[\]]+(?:\[[^\]]*\])?)*)", spec)
    if match is None:
        raise UserError(f"{kind}:{spec}: no split; write {kind}:NAME:SPLIT, as in {kind}:{spec.rstrip(':')}:train")
    return match.group(1), match.group(2)


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


KINDS = {
    "tfds": Kind(TfdsSource, ("data_dir", "image", "label")),
    "hf": Kind(HfSource, ("config", "image", "label")),
}
