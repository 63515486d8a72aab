"""The input pipeline, with grain: turns a source into batches, the same ones with any number of workers.

The data position is the number of examples that the whole run has consumed. An epoch is `N // batch_size` steps; its
order is a permutation drawn from (seed, epoch); its last `N % batch_size` examples are skipped. Every random
draw for an example comes from a counter-based generator keyed by (seed, salt, epoch, example index), so a pipeline
rebuilt at a position resumes exactly, on any number of processes, workers or threads.

A batch is a dict. b: rows of this process; n: `crops.local_count`; C = 2 + n crops; c: channels; S: `data.canvas`.

`data.render = "host"`: crops rendered by PIL
    globals   uint8 [b, 2, H, W, c]
    locals    uint8 [b, n, h, w, c]
`data.render = "device"`: crops to be rendered on the accelerator
    canvas    uint8 [b, S, S, c]   the image in the top left corner, zeros elsewhere
    size      int32 [b, 2]         its height and width on the canvas
    params    `crops.CropParams` with a leading axis b: box int32 [b, C, 4] (top, left, height, width in canvas
              pixels), flip bool [b, C], order int32 [b, C, 4], factors float32 [b, C, 4], jitter bool [b, C],
              gray bool [b, C], blur float32 [b, C], solarize bool [b, C]
in both
    label     int32 [b]            -1: unknown
    masked    bool [b, 2, N]       only with `objective.ibot`: the masked patches of the global crops (`data.masking`)
    index     int64 [b]            the example that was read
    bad       list of (index, name, reason): images of this batch that could not be read and were replaced; plain
              Python, so take it out (`batch.pop("bad")`) before sending the rest to a device

An image whose longer side exceeds the canvas is first shrunk to it (JPEG: partly by the decoder), and its boxes are
drawn on the shrunk image, in whole pixels of the canvas.
Evaluation batches (`make_eval_dataset`) hold image uint8 [b, H, W, c], label, index, valid bool [b] (False: padding of
the last batch, or an unreadable image) and bad.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dino_jax.data import workers
from dino_jax.data.crops import CropParams, cut_resize, draw_many, render_crops, to_pil
from dino_jax.data.decode import MANY_BYTES, BadImage, one_image
from dino_jax.data.masking import Masking, draw, make_masking, slots
from dino_jax.data.memory import BatchMemory, Pixels
from dino_jax.data.reader import Reader, mixed_word, shuffled
from dino_jax.data.sources import Source
from dino_jax.errors import UserError

WAITING_BYTES = 64 << 20  # of images whose crops are drawn together
PATIENCE = 3.0  # seconds that closing waits for reads in progress
CHUNK = 16  # examples that one thread prepares at a time; a batch is made of such chunks

Batch = dict[str, Any]
Rows = slice | Sequence[int] | np.ndarray  # of the global batch

_log = logging.getLogger(__name__)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """N // batch_size; `UserError` if the data set does not fill one batch."""
    if batch_size > examples:
        raise UserError(f"batch_size = {batch_size} is more than the {examples} images of data.train; lower it")
    return examples // batch_size


def make_dataset(
    source: Source, config: Any, *, position: int = 0, salt: int = 0, batch_slice: Rows = slice(None)
) -> Batches:
    """The endless stream of training batches (see the module) from `position` on.

    Args:
      config: the whole configuration; `seed batch_size crops data model.in_chans` decide what the batches hold,
        `run.workers` and `run.threads` only how fast they come.
      position: examples consumed so far, a multiple of `batch_size`.
      salt: changes every draw but not the order of the examples, for the retry after a rewind.
      batch_slice: the rows of the global batch that this process needs, a slice or their numbers.
    Raises `UserError` if the batch is larger than the data set, nothing in it can be read, or (while iterating) more
    than `data.max_bad_share` of it cannot. Close the iterator to end its workers.
    """
    layout = _layout(config)
    if position % config.batch_size:
        raise ValueError(f"position {position} is not a multiple of the batch size {config.batch_size}")
    if config.model.in_chans != 3:
        _log.warning("model.in_chans = %d: crops are cut and flipped, without color operations", config.model.in_chans)
    steps = steps_per_epoch(len(source), config.batch_size)
    limit = config.data.canvas if config.data.render == "device" else None
    reader = Reader(source, config.model.in_chans, limit, config.seed, config.data.max_bad_share, config.data.train)
    reader.probe()
    rows = np.arange(config.batch_size)[batch_slice]
    memory = BatchMemory(layout, len(rows), math.ceil(len(rows) / CHUNK), together=not config.run.workers)
    chunks = TrainChunks(reader, memory, rows, config, steps, salt, position // config.batch_size, make_masking(config))
    return Batches(chunks, config.run.workers, config.run.threads, "run.workers")


def make_eval_dataset(
    source: Source,
    *,
    resize: int,
    crop: int | tuple[int, int],
    batch_size: int,
    rows: Rows = slice(None),
    channels: int = 3,
    workers: int = 0,
    threads: int = 2,
) -> Batches:
    """Every image once, in order, in ceil(N / batch_size) batches; the last is padded (valid False, index -1).

    The shorter side becomes `resize` pixels (bicubic, antialiased; 0: unchanged), then the center `crop` is taken, like
    torchvision's Resize and CenterCrop. `rows`: the rows of the batch that this process needs.
    """
    reader = Reader(source, channels, None, 0, 1.0, "the data set")
    reader.probe()
    size = (crop, crop) if isinstance(crop, int) else crop
    chosen = np.arange(batch_size)[rows]
    layout = {"image": (*size, channels)}
    memory = BatchMemory(layout, len(chosen), math.ceil(len(chosen) / CHUNK), together=not workers)
    return Batches(EvalChunks(reader, memory, chosen, resize, batch_size), workers, threads, "workers")


class Batches(Iterator[Batch]):
    """Batches of chunks, made by grain in threads, or in processes with threads. About two batches are ready ahead.

    Counts the unreadable images of all workers. `close` may be called while another thread waits for a batch.
    """

    def __init__(self, chunks: Chunks, processes: int, threads: int, setting: str):
        self._reader, self._setting = chunks.reader, setting
        parts = chunks.memory.parts
        share = math.ceil(parts / max(processes, 1))  # chunks of a batch for each process
        options = grain.ReadOptions(threads, max(threads, share if processes else 2 * share))
        dataset = grain.MapDataset.source(chunks).to_iter_dataset(options)
        if processes:
            _require_shared_memory(processes * (share + 2) * CHUNK * chunks.memory.row_bytes)
            if not flags.FLAGS.is_parsed():  # grain reads absl flags, which nothing else parses here
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(processes, share), workers.begin_reading)
        merged = dataset.batch(parts, batch_fn=functools.partial(_merge, chunks.memory))
        self._batches = iter(merged)
        self._starting = processes > 0

    def __next__(self) -> Batch:
        try:
            with workers.shielded() if self._starting else contextlib.nullcontext():
                batch = next(self._batches)
            self._starting = False
        except RuntimeError as error:
            status = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if status is None:
                raise
            raise workers.died(self._setting, int(status[1])) from error
        for entry in batch["bad"]:
            self._reader.note(*entry)
        return batch

    def close(self) -> None:
        """Ends the threads and processes. A process that does not end by itself is killed: it holds nothing to lose."""
        processes = [child for child in multiprocessing.active_children() if child.name.startswith("grain-")]
        closing = threading.Thread(target=self._batches.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        if closing.is_alive():
            for child in processes:
                child.kill()
            closing.join(PATIENCE)


def _require_shared_memory(needed: int) -> None:
    """Raises `UserError` unless /dev/shm has `needed` bytes free: worker processes pass chunks through it."""
    if not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise UserError(
            f"run.workers: they need {needed >> 20} MiB of shared memory and /dev/shm has {free >> 20} free; "
            "lower run.workers (0 needs none) or enlarge it (docker run --shm-size)"
        )


def _merge(memory: BatchMemory, chunks: Sequence[Batch]) -> Batch:
    """Chunks of one batch -> the batch."""
    rest = {key: _joined([chunk[key] for chunk in chunks]) for key in chunks[0] if key not in ("batch", "pixels")}
    return memory.whole(chunks[0]["batch"], [chunk["pixels"] for chunk in chunks]) | rest


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], CropParams):
        return CropParams(*(np.concatenate(field) for field in zip(*values, strict=True)))
    return list(itertools.chain.from_iterable(values)) if isinstance(values[0], list) else np.concatenate(values)


@dataclasses.dataclass
class Chunks:
    """Element k is part k % parts of this process's rows of batch k // parts."""

    reader: Reader
    memory: BatchMemory
    rows: np.ndarray  # of the global batch


@dataclasses.dataclass
class TrainChunks(Chunks):
    """Chunks of training batches."""

    config: Any
    steps: int  # per epoch
    salt: int
    start: int  # batches before element 0
    masking: Masking | None

    def __len__(self) -> int:
        return sys.maxsize - self.start * self.memory.parts

    def __getitem__(self, element: int) -> Batch:
        batch, part = divmod(element, self.memory.parts)
        epoch, step = divmod(self.start + batch, self.steps)
        places = step * self.config.batch_size + self.rows[self.memory.part_rows(part)]
        wanted = epoch_order(len(self.reader.source), self.config.seed, epoch, places)
        pixels = self.memory.chunk(batch, part)
        rows, waiting = [], []  # waiting: images whose crops are not rendered yet
        for row, index in enumerate(wanted):
            with one_image():
                image, *read = self.reader.read_or_replace(index)
                rows.append((image.shape[:2], *read))
                if "canvas" in pixels:
                    _place(pixels["canvas"][row], image)
                    continue
                waiting.append(image)
                del image
                if row + 1 == len(wanted) or sum(image.nbytes for image in waiting) > WAITING_BYTES:
                    self._render(pixels, waiting, epoch, wanted, row + 1)
                    waiting.clear()
        sizes, labels, indices, met = zip(*rows, strict=True)
        size = np.array(sizes, np.int32)
        drawn: Batch = {"size": size, "params": self._draw(epoch, wanted, size)} if "canvas" in pixels else {}
        if self.masking is not None:
            drawn["masked"] = self._masks(self.masking, self.start + batch, part, wanted)
        return {
            "batch": batch,
            "pixels": pixels,
            **drawn,
            "label": np.array(labels, np.int32),
            "index": np.array(indices, np.int64),
            "bad": list(itertools.chain.from_iterable(met)),
        }

    def _masks(self, masking: Masking, step: int, part: int, indices: Sequence[int]) -> np.ndarray:
        """The masks of a chunk's global crops, bool [rows, 2, N]; the order of the examples does not matter."""
        epoch, seed = step // self.steps, self.config.seed % 2**64
        masked = np.zeros((len(indices), 2, masking.patches), bool)
        if epoch < masking.start_epoch:
            return masked
        places = slots(masking, self.rows[self.memory.part_rows(part)], (seed, self.salt, step))
        for row, index in enumerate(indices):
            rng = example_rng(seed, self.salt, epoch, index, stream=1)
            for view in range(2):
                masked[row, view] = draw(masking, rng, int(places[row, view]))
        return masked

    def _draw(self, epoch: int, indices: Sequence[int], size: np.ndarray) -> CropParams:
        rngs = [example_rng(self.config.seed, self.salt, epoch, index) for index in indices]
        return draw_many(rngs, size, self.config.crops, self.config.model.in_chans == 3)

    def _render(
        self, pixels: Pixels, images: Sequence[np.ndarray], epoch: int, wanted: Sequence[int], stop: int
    ) -> None:
        """Renders the crops of images whose rows of the chunk end at `stop`."""
        rows = range(stop - len(images), stop)
        size = np.array([image.shape[:2] for image in images], np.int32)
        params = self._draw(epoch, wanted[rows.start : rows.stop], size)
        for place, (row, image) in enumerate(zip(rows, images, strict=True)):
            one = CropParams(*(values[place] for values in params))
            pixels["globals"][row], pixels["locals"][row] = render_crops(image, one, self.config.crops)


@dataclasses.dataclass
class EvalChunks(Chunks):
    """Chunks of evaluation batches."""

    resize: int
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.reader.source) / self.batch_size) * self.memory.parts

    def __getitem__(self, element: int) -> Batch:
        batch, part = divmod(element, self.memory.parts)
        places = batch * self.batch_size + self.rows[self.memory.part_rows(part)]
        index = np.where(places < len(self.reader.source), places, -1)
        pixels = self.memory.chunk(batch, part)
        label, valid, bad = np.full(len(index), -1, np.int32), index >= 0, []
        for row, image in enumerate(pixels["image"]):
            image[:] = 0
            if not valid[row]:
                continue
            try:
                with one_image():
                    read, label[row] = self.reader.read(int(index[row]))
                    image[:] = center_crop(resize_shorter(read, self.resize), image.shape[:2])
                    del read
            except BadImage as error:
                valid[row] = False
                bad.append((int(index[row]), error.name, str(error)))
        pieces = {"label": label, "index": index.astype(np.int64), "valid": valid}
        return {"batch": batch, "pixels": pixels, "bad": bad} | pieces


def _layout(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the pixels of one example in a batch. `UserError` for an unknown `data.render`."""
    crops, channels = config.crops, config.model.in_chans
    layouts: dict[str, dict[str, tuple[int, ...]]] = {
        "host": {
            "globals": (2, *crops.global_size, channels),
            "locals": (crops.local_count, *crops.local_size, channels),
        },
        "device": {"canvas": (config.data.canvas, config.data.canvas, channels)},
    }
    if config.data.render not in layouts:
        raise UserError(f"data.render = {config.data.render!r}: choose one of {', '.join(layouts)}")
    return layouts[config.data.render]


def _place(canvas: np.ndarray, image: np.ndarray) -> None:
    """Puts an image into the canvas's top left corner, and zeros around it."""
    height, width = image.shape[:2]
    canvas[:height, :width] = image
    canvas[:height, width:] = 0
    canvas[height:] = 0


def epoch_order(count: int, seed: int, epoch: int, places: Iterable[int]) -> list[int]:
    """The examples at some places of an epoch's order: a permutation of 0..count-1, not held in memory."""
    key = mixed_word(seed, epoch, 0)
    return [shuffled(int(place), count, key) for place in places]


def example_rng(seed: int, salt: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """The generator of one example's draws in one epoch. Streams: 0 for crops, 1 for masks."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, salt], counter=[0, stream, index, epoch]))


def resize_shorter(pixels: np.ndarray, shorter: int) -> np.ndarray:
    """torchvision's Resize(shorter, bicubic) of uint8 [H, W, c]; 0 leaves it.

    An image more than 16 times as long as wide is cut to its center, to bound the memory.
    """
    height, width = pixels.shape[:2]
    if not shorter or min(height, width) == shorter:
        return pixels
    longest = 16 * min(height, width)
    pixels = pixels[max(0, height - longest) // 2 :][:longest, max(0, width - longest) // 2 :][:, :longest]
    height, width = pixels.shape[:2]
    longer = int(shorter * max(height, width) / min(height, width))
    size = (shorter, longer) if height <= width else (longer, shorter)
    whole = to_pil(pixels) if pixels.nbytes < MANY_BYTES else None
    planes = [np.asarray(plane) for plane in cut_resize(pixels, whole, np.array([0, 0, height, width]), size)]
    return planes[0] if pixels.shape[-1] == 3 else np.stack(planes, axis=-1)


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torchvision's CenterCrop of uint8 [H, W, c]: a smaller image is padded with black."""
    lacks = [max(0, side - have) for side, have in zip(size, pixels.shape[:2], strict=True)]
    pixels = np.pad(pixels, [(lack // 2, (lack + 1) // 2) for lack in lacks] + [(0, 0)])
    top, left = (round((have - side) / 2) for side, have in zip(size, pixels.shape[:2], strict=True))
    return pixels[top : top + size[0], left : left + size[1]]
