"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and one line on the terminal.

Knows nothing of what the numbers mean. Only the process that is `active` (process 0) writes anything.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
import tensorboardX
from etils import epath

from dino_jax.errors import UserError

JSONL = "metrics.jsonl"
Value = float | int | bool | str


class MetricWriter:
    """Writes scalars and pictures of a run.

    `metrics.jsonl` holds one JSON object a line, each with `step`. A number that is not finite is written as the
    string "NaN", "Infinity" or "-Infinity", so that every line is valid JSON and `float(value)` reads all of them.

    Args:
        workdir: any path that `etils.epath` knows, gs:// too; made if absent.
        active: False: every method does nothing.
        resume_step: the restored step: later lines are cut from `metrics.jsonl` (in one move: a kill leaves the old
            file or the new one) and hidden from TensorBoard. None: a new run, whose file starts empty.
        tensorboard: also write `workdir/tensorboard/`.
        wandb_project: also report to this Weights & Biases project; "": do not.
        config_json: the configuration, for Weights & Biases.

    Raises `UserError` where the workdir cannot be written or wandb is not installed.
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
        self._tensorboard = self._wandb = None
        self._lines: _Lines | None = None
        if not active:
            return
        workdir = epath.Path(workdir).expanduser()
        with _write_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            self._lines = _lines(workdir / JSONL, resume_step)
            if tensorboard:
                purge = None if resume_step is None else resume_step + 1
                self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)
        if wandb_project:
            self._wandb = _start_wandb(workdir, wandb_project, config_json, resume_step is not None)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: `step` and `values` (Python, NumPy or JAX scalars; strings go to `metrics.jsonl` only)."""
        if self._lines is None:
            return
        values = {name: _plain(value) for name, value in values.items()}
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        with _write_errors(self._lines.path):
            self._lines.append(json.dumps({"step": int(step)} | {k: _valid(v) for k, v in values.items()}))
            if self._tensorboard:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures, uint8 [H, W, 3], to TensorBoard and Weights & Biases."""
        for name, picture in pictures.items():
            if self._tensorboard:
                self._tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Image(np.asarray(picture))}, step=step)

    def flush(self) -> None:
        """Everything written is on disk, or in the bucket, when this returns. Call it before saving a checkpoint."""
        if self._lines is None:
            return
        with _write_errors(self._lines.path):
            self._lines.flush()
            if self._tensorboard:
                self._tensorboard.flush()

    def close(self) -> None:
        """`flush`, and end the TensorBoard and Weights & Biases records."""
        self.flush()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._lines = self._tensorboard = self._wandb = None


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order, "NaN" and its like as floats again.

    A last line that a kill left unfinished is passed over. Raises `UserError` if there is no file or it is broken.
    """
    path = epath.Path(workdir).expanduser() / JSONL
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
        self.path = path
        self._file = path.open("a")

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()


class _ObjectLines(_Lines):
    """The same in a bucket, whose objects cannot be appended to: the file is held here and put up whole.

    At most every `interval` seconds, or twenty times what the last upload took, and on `flush`.
    """

    interval = 30.0

    def __init__(self, path: epath.Path):
        self.path = path
        self._held = [path.read_text()]
        self._due, self._dirty = time.monotonic() + self.interval, False

    def append(self, line: str) -> None:
        self._held.append(line + "\n")
        self._dirty = True
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        if not self._dirty:
            return
        start = time.monotonic()
        self._held = ["".join(self._held)]
        self.path.write_text(self._held[0])
        end = time.monotonic()
        self._due, self._dirty = end + max(self.interval, 20 * (end - start)), False


def _lines(path: epath.Path, resume_step: int | None) -> _Lines:
    """Opens `path` for appending after its lines up to `resume_step`; None: after none."""
    kept = []
    if resume_step is not None and path.exists():
        kept = [line + "\n" for line, record in _records(path) if record["step"] <= resume_step]
    text = "".join(kept)
    if "://" in str(path):
        path.write_text(text)  # an object appears whole or not at all
        return _ObjectLines(path)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
    return _Lines(path)


def _start_wandb(workdir: epath.Path, project: str, config_json: str, resume: bool) -> Any:
    """A W&B run; a resumed one goes on under the id that the workdir remembers."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"run.wandb={project}: wandb is not installed; `pip install wandb`, or set it to ''") from error
    remembered = workdir / "wandb_id"
    name = remembered.read_text() if resume and remembered.exists() else None
    run = wandb.init(project=project, config=json.loads(config_json), id=name, resume="allow" if name else None)
    remembered.write_text(run.id)
    return run


def _plain(value: Any) -> Value:
    return value if isinstance(value, str | bool | int | float) else np.asarray(value).item()


def _valid(value: Value) -> Value:
    """`value`, or the name of a float that JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@contextlib.contextmanager
def _write_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error


class Progress:
    """One line on a terminal, redrawn: step, given fields, time left. Elsewhere a plain line now and then.

        train [=====>    ] 1200/2500  epoch 4.8  loss 5.312  images/s 412  ETA 0:12:30

    Args:
        total: steps at the end; `initial`: steps done before.
        description: the first word of the line.
        active: False: silent.
        interval: seconds between lines where the stream is not a terminal.
        stream: standard error unless given.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        *,
        active: bool = True,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self._description, self._active, self._clock = description, active, clock
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._interval = 0.1 if self._live else interval
        self._shown = -math.inf
        self._line = ""
        self._history = collections.deque([(clock(), initial)], maxlen=200)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, **fields: float | str) -> None:
        """`step` steps are done. Cheap: most calls draw nothing."""
        now = self._clock()
        self._history.append((now, step))
        if self._active and (now - self._shown >= self._interval or step >= self.total):
            self._line, self._shown = self._format(step, fields), now
            self._draw(self._line)

    def note(self, line: str) -> None:
        """Prints a line of its own above the bar."""
        if self._active:
            self._stream.write(("\r\x1b[K" if self._live else "") + line + "\n")
            if self._live and self._line:
                self._draw(self._line)
            self._stream.flush()

    def close(self) -> None:
        """Leaves the last state of the bar standing on its line."""
        if self._active and self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._active = False

    def eta(self) -> float:
        """Seconds left at the pace of the last 200 updates; infinity before the second."""
        (start, first), (now, step) = self._history[0], self._history[-1]
        return (now - start) / (step - first) * (self.total - step) if step > first else math.inf

    def _draw(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width] + "\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _format(self, step: int, fields: Mapping[str, float | str]) -> str:
        share = step / max(self.total, 1)
        bar = ("=" * int(20 * share) + ">").ljust(20)[:20]
        shown = [f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in fields.items()]
        left = self.eta()
        shown.append(f"ETA {datetime.timedelta(seconds=round(left))}" if math.isfinite(left) else "ETA -")
        return "  ".join([f"{self._description} [{bar}] {step}/{self.total}".strip(), *shown])


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
