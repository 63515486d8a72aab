"""One ArrayRecord shard of `dino-jax pack`: written, read back, and only then put in its place."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dino_jax.data import workers
from dino_jax.data.arrayrecord_source import WRITER_OPTIONS, encode_record
from dino_jax.data.decode import BadImage, decode, resize, strips
from dino_jax.data.example import Example
from dino_jax.data.sources import Source
from dino_jax.data.storage import is_remote, new_file, read_json, write_atomically
from dino_jax.errors import UserError

JPEG_QUALITY = 95  # of JPEGs that were shrunk

Summary = dict[str, Any]  # of a shard, as JSON


_shards: Shards  # of a worker process


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of one data set: shard k holds the images k * size to (k + 1) * size, without unreadable ones."""

    source: Source
    out: str
    size: int  # images
    shorter_side: int  # pixels; larger images are shrunk to it; 0: none are
    channels: int

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.size)

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self.source)))

    def path(self, shard: int) -> epath.Path:
        """The file of a shard."""
        return epath.Path(self.out) / f"pictures-{shard:05d}-of-{len(self):05d}.array_record"

    def summary_path(self, shard: int) -> epath.Path:
        """The file of its summary, until the manifest is written."""
        return self.path(shard).with_suffix(".json")

    def finished(self, shard: int) -> Summary | None:
        """The summary of a shard that an earlier run finished; None if there is none or the shard is damaged."""
        try:
            summary = read_json(self.summary_path(shard))
        except UserError:  # absent or damaged
            return None
        return summary if _is_whole(summary) and intact(self.path(shard), summary) else None

    def make(self, shard: int) -> Summary:
        """Writes a shard and its summary. Raises `UserError` if they cannot be written."""
        path, tally = self.path(shard), Tally()
        try:
            with new_file(path) as local:
                about = write(local, self._records(shard, tally))
                if not intact(local, about):
                    raise UserError(f"{path}: what was written does not read back: check the disk and run it again")
            summary = {"file": path.name, **about, **tally.summary()}
            write_atomically(self.summary_path(shard), json.dumps(summary))
        except (OSError, RuntimeError) as error:  # RuntimeError: of ArrayRecord's writer
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be written: {reason}; fix that and run it again: it resumes") from error
        return summary

    def _records(self, shard: int, tally: Tally) -> Iterator[bytes]:
        for index in self.indices(shard):
            name = f"image {index}"
            try:
                example = self.source[index]
                name = example.name
                pixels = decode(example.image, self.channels)
            except BadImage as error:
                tally.bad.append([error.name or name, str(error)])
                continue
            limit = self.shorter_side
            if limit and min(pixels.shape[:2]) > limit:
                pixels = resize(pixels, *shorter_to(limit, *pixels.shape[:2]))
                example = example._replace(image=encode_again(example.image, pixels))
            tally.add(example, pixels)
            yield encode_record(example)


class Tally:
    """Statistics of the images of a shard. Each image has the same weight in mean and mean square."""

    def __init__(self) -> None:
        self.bad: list[list[str]] = []  # name, reason
        self.labels: dict[int, int] = {}
        self.sizes: list[tuple[int, int]] = []  # height, width
        self.moments: list[tuple[np.ndarray, np.ndarray]] = []  # mean and mean square by channel, of values in 0..1

    def add(self, example: Example, pixels: np.ndarray) -> None:
        """Adds an image, uint8 [H, W, C]."""
        self.labels[example.label] = self.labels.get(example.label, 0) + 1
        self.sizes.append(pixels.shape[:2])
        levels = np.arange(256) / 255
        counts = np.zeros((pixels.shape[-1], 256), np.int64)
        for rows in strips(*pixels.shape[:2]):  # bincount holds 8 bytes for each pixel
            counts += [np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(pixels[rows], -1, 0)]
        shares = counts / counts.sum(axis=1, keepdims=True)  # [C, 256]
        self.moments.append((shares @ levels, shares @ levels**2))

    def summary(self) -> Summary:
        """The statistics for JSON, as sums over the images."""
        sums = np.sum(self.moments, axis=0).tolist() if self.moments else [[], []]
        return {
            "bad": self.bad,
            "labels": sorted(self.labels.items()),
            "sizes": {
                side: {"min": min(values), "sum": sum(values), "max": max(values)}
                for side, values in zip(("height", "width"), zip(*self.sizes, strict=True), strict=False)
            },
            "sum": sums[0],
            "sum_squares": sums[1],
        }


def _is_whole(summary: Summary) -> bool:
    """Whether a summary from a file has what `intact` and `merged` read."""
    try:
        if summary["count"]:
            merged([summary])
        texts = [text for name, reason in summary["bad"] for text in (name, reason)]
        return all(isinstance(text, str) for text in texts) and type(summary["bytes"]) is type(summary["crc32"]) is int
    except Exception:  # wrong types fail in any way
        return False


def write(path: pathlib.Path, records: Iterator[bytes]) -> Summary:
    """Writes an ArrayRecord file; returns its number of records, its size and the checksum of all records."""
    from array_record.python import array_record_module

    count, checksum = 0, 0
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
            count, checksum = count + 1, zlib.crc32(record, checksum)
    finally:
        writer.close()
    return {"count": count, "bytes": path.stat().st_size, "crc32": checksum}


def intact(path: epath.Path | pathlib.Path, about: Summary) -> bool:
    """Whether a file holds the records that `about` (as from `write`) says."""
    from array_record.python import array_record_module

    here = epath.Path(path)
    if not here.exists() or here.stat().length != about["bytes"]:
        return False
    if is_remote(path):
        return True  # it was verified before it was sent
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        checksum, count = 0, reader.num_records()
        for _ in range(count):
            checksum = zlib.crc32(reader.read(), checksum)
        reader.close()
    except (RuntimeError, IndexError, ValueError):  # of a damaged file
        return False
    return (count, checksum) == (about["count"], about["crc32"])


def shorter_to(limit: int, height: int, width: int) -> tuple[int, int]:
    """Height and width with the shorter side at `limit` and the other in proportion."""
    scale = limit / min(height, width)
    return max(limit, round(height * scale)), max(limit, round(width * scale))


def encode_again(before: bytes | np.ndarray, pixels: np.ndarray) -> bytes | np.ndarray:
    """Pixels as the image was stored: JPEG for a JPEG, an array for an array, else PNG where it can hold them."""
    if isinstance(before, np.ndarray) or pixels.shape[-1] not in (1, 3):
        return pixels
    image, file = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), io.BytesIO()
    if before[:2] == b"\xff\xd8":
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def merged(summaries: Sequence[Summary]) -> Summary:
    """What a manifest says of all shards together."""
    count = sum(summary["count"] for summary in summaries)
    filled = [summary for summary in summaries if summary["count"]]
    labels: dict[int, int] = {}
    for label, number in (pair for summary in filled for pair in summary["labels"]):
        labels[label] = labels.get(label, 0) + number
    mean = np.sum([summary["sum"] for summary in filled], axis=0) / count
    variance = np.sum([summary["sum_squares"] for summary in filled], axis=0) / count - mean**2
    return {
        "count": count,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "sizes": {
            side: {
                "min": min(summary["sizes"][side]["min"] for summary in filled),
                "mean": round(sum(summary["sizes"][side]["sum"] for summary in filled) / count, 1),
                "max": max(summary["sizes"][side]["max"] for summary in filled),
            }
            for side in ("height", "width")
        },
        "mean": mean.round(5).tolist(),
        "std": np.sqrt(np.maximum(variance, 0)).round(5).tolist(),
        "bad": [entry for summary in summaries for entry in summary["bad"]],
        "shards": [{key: summary[key] for key in ("file", "count", "bytes", "crc32")} for summary in summaries],
    }


def begin_worker(shards: Shards) -> None:
    """Prepares a worker process for `make_in_worker`."""
    global _shards
    _shards = shards
    workers.begin()


def make_in_worker(shard: int) -> Summary:
    """`Shards.make` in a worker process."""
    return _shards.make(shard)
