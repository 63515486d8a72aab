"""A trace of what host and devices do, for xprof or TensorBoard, in any folder that `etils.epath` knows."""

from __future__ import annotations

import pathlib
import tempfile

import jax
from etils import epath

from dino_jax.data.storage import write_atomically, writing


class Trace:
    """JAX's profiler, which writes to local folders only: its files are copied to `folder` when it stops."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self._local: tempfile.TemporaryDirectory[str] | None = None

    @property
    def running(self) -> bool:
        return self._local is not None

    def start(self) -> None:
        self._local = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._local.name)

    def stop(self, save: bool = True) -> None:
        """Ends the trace that runs, if any, and saves it; `UserError` where that cannot be written."""
        if self._local is None:
            return
        files, self._local = self._local, None
        with files as name, writing(f"{self.folder}: cannot write a trace"):
            jax.profiler.stop_trace()
            found = [path for path in pathlib.Path(name).rglob("*") if path.is_file() and save]
            for path in found:
                write_atomically(self.folder / str(path.relative_to(name)), path.read_bytes())
