"""Writes a run's metrics to metrics.jsonl, TensorBoard and Weights & Biases.

Only the `active` process (process 0) writes anything.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dino_jax.data.storage import absolute, cause, is_remote, read_text, write_atomically, writing
from dino_jax.errors import UserError

log = logging.getLogger(__name__)

JSONL = "metrics.jsonl"
FLUSH_SECONDS = 30.0


class MetricWriter:
    """Writes scalars and images of a run.

    `metrics.jsonl` holds one JSON object a line, each with `step`. A number that is not finite is written as the
    string "NaN", "Infinity" or "-Infinity", so that every line is valid JSON and `float(value)` reads all of them.
    A local file gets each line at once. A bucket's objects cannot be appended to: there the file is kept in memory and
    uploaded whole, on `flush` and every 30 seconds (or 20 times the upload's duration); the same for TensorBoard's.

    Args:
        workdir: any path that `etils.epath` supports, gs:// too; created if missing.
        active: if False, every method does nothing.
        resume_step: the restored step: later lines are cut from `metrics.jsonl` (atomically) and hidden from
            TensorBoard. None: a new run, whose file starts empty.
        every: steps between lines, to warn at a resume if earlier lines were lost; 0: no warning.
        tensorboard: also write `workdir/tensorboard/`.
        wandb_project: also report to this Weights & Biases project; "": none.
        config_json: the configuration, for Weights & Biases.

    `recorded` has the names in the lines of `resume_step`.

    Raises `UserError` if the workdir cannot be written (`write` and `flush` too; nothing is written after that), or if
    wandb is not installed or does not start.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        active: bool = True,
        resume_step: int | None = None,
        every: int = 0,
        tensorboard: bool = True,
        wandb_project: str = "",
        config_json: str = "{}",
    ):
        self._workdir = absolute(workdir)
        self._lines: _Lines | None = None
        self._board: _Board | None = None
        self._wandb: Any = None
        self._due = 0.0  # when to flush again
        self.recorded: set[str] = set()
        if active:
            with self._writing():
                self._workdir.mkdir(parents=True, exist_ok=True)
                kept = _kept(self._workdir / JSONL, resume_step, every)
                self.recorded = {name for _, record in kept if record["step"] == resume_step for name in record}
                self._lines = _lines(self._workdir / JSONL, [line for line, _ in kept])
                self._board = _Board(self._workdir / "tensorboard", resume_step) if tensorboard else None
            if wandb_project:
                self._wandb = _start_wandb(self._workdir, wandb_project, config_json, resume_step is not None)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line: `step` and `values` (Python, NumPy or JAX scalars; strings go to `metrics.jsonl` only)."""
        if self._lines is None:
            return
        values = {name: value if isinstance(value, str) else np.asarray(value).item() for name, value in values.items()}
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        record = {"step": int(step)} | {name: _valid(value) for name, value in values.items()}
        with self._writing():
            self._lines.append(json.dumps(record))
            if self._board:
                self._board.add(step, Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]))
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if time.monotonic() >= self._due:
            self.flush()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Sends images, uint8 [H, W, 3], to TensorBoard and Weights & Biases."""
        for name, image in images.items():
            if self._board:
                with self._writing():
                    self._board.add(step, summary.image(name, np.asarray(image), dataformats="HWC"))
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Image(np.asarray(image))}, step=step)

    def flush(self) -> None:
        """Puts everything written on disk or in the bucket. Call it before saving a checkpoint."""
        start = time.monotonic()
        with self._writing():
            if self._lines:
                self._lines.flush()
            if self._board:
                self._board.flush()
        self._due = time.monotonic() + max(FLUSH_SECONDS, 20 * (time.monotonic() - start))

    def close(self) -> None:
        """Flushes, and ends the Weights & Biases run."""
        self.flush()
        if self._wandb:
            self._wandb.finish()
        self._lines = self._board = self._wandb = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(f"{self._workdir}: cannot write"):
                yield
        except UserError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Closes the files and drops what is not yet written; writes nothing more."""
        for file in (self._lines, self._board):
            with contextlib.suppress(Exception):
                if file:
                    file.close()
        self._lines = self._board = None


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in order, with "NaN" and infinities as floats again.

    Skips a last line that a kill left unfinished. Raises `UserError` if the file is missing or broken.
    """
    path = absolute(workdir) / JSONL
    if not path.exists():
        raise UserError(f"{path}: no such file; give the workdir of a run")
    names = {name: float(name) for name in ("NaN", "Infinity", "-Infinity")}
    return [{key: names.get(value, value) for key, value in record.items()} for _, record in _records(path)]


def _records(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the file, each with its parsed record."""
    lines = read_text(path).rstrip("\n").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append((line, _record(line)))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object with a step; remove it") from error
    return records


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("no step")
    if not all(isinstance(value, str | int | float) for value in record.values()):
        raise ValueError("not numbers")
    return record


class _Lines:
    """Appends lines to a local file and flushes each."""

    def __init__(self, path: epath.Path):
        self._file = path.open("a")

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _ObjectLines(_Lines):
    """Keeps the lines in memory; `flush` uploads the whole object."""

    def __init__(self, path: epath.Path):
        self._path, self._text = path, io.StringIO()
        self._text.write(path.read_text())

    def append(self, line: str) -> None:
        self._text.write(line + "\n")

    def flush(self) -> None:
        write_atomically(self._path, self._text.getvalue())

    def close(self) -> None:
        pass


def _kept(path: epath.Path, resume_step: int | None, every: int) -> list[tuple[str, dict[str, Any]]]:
    """The lines that a run resumed at `resume_step` keeps, with their records; warns if earlier ones are missing."""
    if resume_step is None:
        return []
    kept = [pair for pair in (_records(path) if path.exists() else []) if pair[1]["step"] <= resume_step]
    logged = sorted({0, *(record["step"] for _, record in kept)})
    usual = max(every, *(after - before for before, after in itertools.pairwise(logged[1:])), 0)
    ends = [*logged, resume_step + 1]
    for before, after in ((ends[0], ends[1]), (ends[-2], ends[-1])):
        if every and after - before > usual:
            lost = f"no lines of steps {before + 1} to {after - 1}"
            log.warning("%s: %s: they were removed after the run had written them; it goes on", path, lost)
            break
    return kept


def _lines(path: epath.Path, kept: list[str]) -> _Lines:
    """Opens `path` for appending, with these lines."""
    write_atomically(path, "".join(line + "\n" for line in kept))
    return _ObjectLines(path) if is_remote(path) else _Lines(path)


class _Board:
    """TensorBoard's event file, written in this thread; for a bucket, `flush` uploads it whole."""

    def __init__(self, folder: epath.Path, resume_step: int | None):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if is_remote(folder) else None
        self._local = epath.Path(self._temporary.name) if self._temporary else folder
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self._local / "events"), f".{resume_step or 0}")
        if resume_step is not None:  # hides earlier files' records from this step on
            self._events.write_event(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=values))

    def flush(self) -> None:
        self._events.flush()
        if self._temporary:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._local.iterdir():
                write_atomically(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        self._events._py_recordio_writer.close()  # EventsWriter.close leaves the file open if flushing fails


def _start_wandb(workdir: epath.Path, project: str, config_json: str, resume: bool) -> Any:
    """Starts a W&B run, or resumes the one whose id is in the workdir."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"run.wandb={project}: wandb is not installed; `pip install wandb`, or set it to ''") from error
    remembered = workdir / "wandb_id"
    name = read_text(remembered).strip() if resume and remembered.exists() else None
    try:
        run = wandb.init(project=project, config=json.loads(config_json), id=name, resume="allow" if name else None)
    except Exception as error:  # no account, no network: wandb's own error types
        fix = "`wandb login`, set WANDB_MODE=offline, or set it to ''"
        raise UserError(f"run.wandb={project}: wandb does not start: {cause(error)}; {fix}") from error
    with writing(f"{remembered}: cannot write"):
        write_atomically(remembered, run.id)
    return run


def _valid(value: Any) -> Any:
    """`value`, or its name if it is a float that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Throughput:
    """Images per second and share of time waiting for input, since the last `read` or `reset`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Restarts the measurement, after compiling or an evaluation."""
        self._start, self._waited, self._images = self._clock(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def count(self, images: int) -> None:
        """Counts `images` as trained on."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Returns `images_per_second` and `input_wait` (0 to 1), and resets."""
        elapsed = max(self._clock() - self._start, 1e-9)
        result = {"images_per_second": self._images / elapsed, "input_wait": min(self._waited / elapsed, 1.0)}
        self.reset()
        return result
