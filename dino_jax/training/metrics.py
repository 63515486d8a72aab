"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and one line on the terminal.

Knows nothing of what the numbers mean. Only the process that is `active` (process 0) writes anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
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

from dino_jax.data.storage import absolute, cause, is_remote, write_atomically, writing
from dino_jax.errors import UserError

JSONL = "metrics.jsonl"
FLUSH_SECONDS = 30.0


class MetricWriter:
    """Writes scalars and images of a run.

    `metrics.jsonl` holds one JSON object a line, each with `step`. A number that is not finite is written as the
    string "NaN", "Infinity" or "-Infinity", so that every line is valid JSON and `float(value)` reads all of them.
    A local file has each line at once. A bucket's objects cannot be appended to: there the file is kept in memory and
    put up whole, every 30 seconds (or twenty times what that takes) and on `flush`; TensorBoard's likewise.

    Args:
        workdir: any path that `etils.epath` knows, gs:// too; made if absent.
        active: False: every method does nothing.
        resume_step: the restored step: later lines are cut from `metrics.jsonl` (in one move: a kill leaves the old
            file or the new one) and hidden from TensorBoard. None: a new run, whose file starts empty.
        tensorboard: also write `workdir/tensorboard/`.
        wandb_project: also report to this Weights & Biases project; "": do not.
        config_json: the configuration, for Weights & Biases.

    Raises `UserError` where the workdir cannot be written (`write` and `flush` too: then the writing is over), or wandb
    is not installed or does not start.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        active: bool = True,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str = "",
        config_json: str = "{}",
    ):
        self._workdir = absolute(workdir)
        self._lines: _Lines | None = None
        self._board: _Board | None = None
        self._wandb: Any = None
        self._due = 0.0  # when to flush again
        if active:
            with self._writing():
                self._workdir.mkdir(parents=True, exist_ok=True)
                self._lines = _lines(self._workdir / JSONL, resume_step)
                self._board = _Board(self._workdir / "tensorboard", resume_step) if tensorboard else None
            if wandb_project:
                self._wandb = _start_wandb(self._workdir, wandb_project, config_json, resume_step is not None)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: `step` and `values` (Python, NumPy or JAX scalars; strings go to `metrics.jsonl` only)."""
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
        """Images, uint8 [H, W, 3], to TensorBoard and Weights & Biases."""
        for name, image in images.items():
            if self._board:
                with self._writing():
                    self._board.add(step, summary.image(name, np.asarray(image), dataformats="HWC"))
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Image(np.asarray(image))}, step=step)

    def flush(self) -> None:
        """Everything written is on disk, or in the bucket, when this returns. Call it before saving a checkpoint."""
        start = time.monotonic()
        with self._writing():
            if self._lines:
                self._lines.flush()
            if self._board:
                self._board.flush()
        self._due = time.monotonic() + max(FLUSH_SECONDS, 20 * (time.monotonic() - start))

    def close(self) -> None:
        """`flush`, and end the Weights & Biases run."""
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
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Lets go of the files, and of what they could not write: nothing is tried again later."""
        for file in (self._lines, self._board):
            with contextlib.suppress(Exception):
                if file:
                    file.close()
        self._lines = self._board = None


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order, "NaN" and its like as floats again.

    A last line that a kill left unfinished is passed over. Raises `UserError` if there is no file or it is broken.
    """
    path = absolute(workdir) / JSONL
    if not path.exists():
        raise UserError(f"{path}: no such file; give the workdir of a run")
    names = {name: float(name) for name in ("NaN", "Infinity", "-Infinity")}
    return [{key: names.get(value, value) for key, value in record.items()} for _, record in _records(path)]


def _records(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the file, each with what it says."""
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append((line, record | {"step": int(record["step"])}))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object with a step; remove it") from error
    return records


class _Lines:
    """Appends lines to a local file, each in the system's hands at once."""

    def __init__(self, path: epath.Path):
        self._file = path.open("a")

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _ObjectLines(_Lines):
    """Keeps the lines of an object and puts it up whole."""

    def __init__(self, path: epath.Path):
        self._path, self._text = path, io.StringIO()
        self._text.write(path.read_text())

    def append(self, line: str) -> None:
        self._text.write(line + "\n")

    def flush(self) -> None:
        write_atomically(self._path, self._text.getvalue())

    def close(self) -> None:
        pass


def _lines(path: epath.Path, resume_step: int | None) -> _Lines:
    """Opens `path` for appending after its lines up to `resume_step`; None: after none."""
    kept = []
    if resume_step is not None and path.exists():
        kept = [line + "\n" for line, record in _records(path) if record["step"] <= resume_step]
    write_atomically(path, "".join(kept))
    return _ObjectLines(path) if is_remote(path) else _Lines(path)


class _Board:
    """TensorBoard's event file, written by this thread; one meant for a bucket is put up whole by `flush`."""

    def __init__(self, folder: epath.Path, resume_step: int | None):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if is_remote(folder) else None
        self._local = epath.Path(self._temporary.name) if self._temporary else folder
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self._local / "events"), f".{resume_step or 0}")
        if resume_step is not None:  # TensorBoard hides what earlier files say of this step and later ones
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
        self._events._py_recordio_writer.close()  # EventsWriter.close leaves the file open where flushing fails


def _start_wandb(workdir: epath.Path, project: str, config_json: str, resume: bool) -> Any:
    """A W&B run; a resumed one goes on under the id that the workdir remembers."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"run.wandb={project}: wandb is not installed; `pip install wandb`, or set it to ''") from error
    remembered = workdir / "wandb_id"
    name = remembered.read_text() if resume and remembered.exists() else None
    try:
        run = wandb.init(project=project, config=json.loads(config_json), id=name, resume="allow" if name else None)
    except Exception as error:  # no account, no network: wandb's own kinds
        fix = "`wandb login`, set WANDB_MODE=offline, or set it to ''"
        raise UserError(f"run.wandb={project}: wandb does not start: {cause(error)}; {fix}") from error
    with writing(f"{remembered}: cannot write"):
        write_atomically(remembered, run.id)
    return run


def _valid(value: Any) -> Any:
    """`value`, or the name of a float that JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Throughput:
    """Images a second and the share of time spent waiting for input, since the last `read` or `reset`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Starts afresh: after what is not training, such as compiling or an evaluation."""
        self._start, self._waited, self._images = self._clock(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within counts as waiting for input."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def count(self, images: int) -> None:
        """`images` more were trained on."""
        self._images += images

    def read(self) -> dict[str, float]:
        """`images_per_second` and `input_wait` (0 to 1), and a fresh start."""
        elapsed = max(self._clock() - self._start, 1e-9)
        result = {"images_per_second": self._images / elapsed, "input_wait": min(self._waited / elapsed, 1.0)}
        self.reset()
        return result
