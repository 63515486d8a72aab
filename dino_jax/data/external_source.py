"""Data sets of other libraries: TensorFlow Datasets (without TensorFlow) and Hugging Face `datasets` (an extra)."""

from __future__ import annotations

import os
import re
from typing import Any

from dino_jax.data.decode import BadImage, read_bytes
from dino_jax.data.example import Example, Kind, whole_labels
from dino_jax.errors import UserError, did_you_mean


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
        self.class_names = tuple(features[label].names or ()) or None if label in features else None
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
        label = int(whole_labels(row.get(self.label, -1), f"{self.where}, row {index}"))
        return Example(row[self.image], label, name if isinstance(name, str) else name.decode())


class HfSource:
    """A data set of Hugging Face `datasets` by name, or a folder of its `save_to_disk`. Images stay encoded."""

    def __init__(self, spec: str, config: str | None = None, image: str | None = None, label: str | None = None):
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"hf:{spec}: needs the package datasets; pip install 'dino-jax[hf]'") from error
        self.where = f"hf:{spec}"
        name, self.split = split_name("hf", spec)
        rows = self._load(datasets, name, config)
        self.image = image or self._find(rows, datasets.Image, "image")
        if not isinstance(rows.features.get(self.image), datasets.Image):
            raise UserError(f"{self.where}: no image {self.image!r} in {', '.join(rows.features)}; say ?image=KEY")
        self.label = label or self._find(rows, datasets.ClassLabel, "label")
        if label and label not in rows.features:
            raise UserError(f"{self.where}: no {label!r} in {', '.join(rows.features)}")
        feature = rows.features.get(self.label)
        names = getattr(feature, "names", None)
        self._words: dict[str, int] = {}  # classes that the data set gives by name
        if getattr(feature, "dtype", None) == "string" and not names:
            names = sorted(name for name in rows.unique(self.label) if name is not None)
            self._words = {name: number for number, name in enumerate(names)}
        self.class_names = tuple(names) if names else None
        self._rows = rows.cast_column(self.image, datasets.Image(decode=False))

    def _load(self, datasets: Any, name: str, config: str | None) -> Any:
        try:
            if os.path.isdir(name):
                loaded = datasets.load_from_disk(name)
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(name, config, split=self.split)
        except KeyError as error:
            raise UserError(f"{self.where}: no split {self.split!r} (splits: {', '.join(loaded)})") from error
        except Exception as error:  # missing names, no network, unknown configs: each its own type
            raise UserError(f"{self.where}: {_line(error)}") from error

    @staticmethod
    def _find(rows: Any, kind: type, default: str) -> str:
        """The first column of a kind of feature."""
        return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), default)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image, label = row[self.image], row.get(self.label)
        label = self._words.get(label, label)
        number = -1 if label is None else int(whole_labels(label, f"{self.where}, row {index}"))
        name = os.path.basename(image["path"] or "") or f"{self.split}-{index:07d}"
        return Example(read_bytes(image["path"]) if image["bytes"] is None else image["bytes"], number, name)


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
