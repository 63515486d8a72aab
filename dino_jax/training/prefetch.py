"""Prefetches batches to the devices: host pipeline, transfer and renderer in a separate thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.data.pipeline import Batches, make_dataset
from dino_jax.data.sources import Source
from dino_jax.data.storage import read_file, write_atomically, writing
from dino_jax.errors import printable
from dino_jax.models.network import Views
from dino_jax.parallel import sharding
from dino_jax.render.renderer import make_renderer

HOST_ONLY = ("index", "label")  # fields that are not rendered
CLOSING = 5.0  # seconds to wait for the thread to end


class Ready(NamedTuple):
    """One batch on the devices."""

    inputs: Views  # crops normalized, in the compute type: [globals [B, 2, H, W, c], locals [B, n, h, w, c]]
    bad: list[tuple[int, str, str]]  # index, name and reason of the images that this process could not read


class BadFiles:
    """`WORKDIR/bad_files.txt`: each unreadable image once, its name, a tab and the reason; one file per process.

    Names are written as `printable` gives them. Lines that are already there are kept as they are, whatever they hold.
    """

    def __init__(self, workdir: epath.Path):
        name = "bad_files.txt" if jax.process_index() == 0 else f"bad_files-{jax.process_index()}.txt"
        self._path, self._known = workdir / name, set()
        with writing(f"{self._path}: cannot be read"):
            if self._path.exists():
                lines = read_file(self._path).decode("utf-8", "replace").split("\n")
                self._known = {line.split("\t")[0] for line in lines}

    def note(self, bad: list[tuple[int, str, str]]) -> None:
        """Adds those (index, name, reason) that are new."""
        named = {printable(name): printable(reason) for _, name, reason in bad}
        new = {name: reason for name, reason in named.items() if name not in self._known}
        if new:
            self._known.update(new)
            with writing(f"{self._path}: cannot write"):
                before = read_file(self._path) if self._path.exists() else b""
                lines = "".join(f"{name}\t{reason}\n" for name, reason in new.items())
                gap = b"" if before.endswith(b"\n") or not before else b"\n"
                write_atomically(self._path, before + gap + lines.encode())


class Stalled(Exception):
    """No batch came in time."""


def device_batches(
    config: ConfigDict, source: Source, mesh: Mesh, *, position: int, salt: int, limit: float = 0
) -> Generator[Ready, None, None]:
    """Endless training batches from `position` (examples already consumed by the run).

    Each process reads its own rows. Pixels are sent as uint8 and normalized (with `data.render=device` also rendered)
    on the devices, where `run.prefetch` batches wait. Closing the generator ends its thread.

    The thread runs no multi-process programs: those must start in the same order everywhere, and would race with the
    steps.

    Raises:
      Stalled: a batch takes more than `limit` seconds; 0: no limit.
    """
    here, rows = sharding.local_rows(config.batch_size, mesh)
    render = make_renderer(config, here)
    opened: list[Batches] = []

    def produce() -> Generator[Ready, None, None]:
        opened.append(make_dataset(source, config, position=position, salt=salt, batch_slice=rows))
        for batch in opened[0]:
            bad = batch.pop("bad")
            placed = jax.device_put({key: x for key, x in batch.items() if key not in HOST_ONLY}, here)
            masked = placed.pop("masked", None)
            inputs = Views(render(placed), masked)
            yield Ready(jax.tree.map(lambda x: sharding.of_all(x, mesh, config.batch_size), inputs), bad)

    def end() -> None:
        for batches in opened:
            with contextlib.suppress(ValueError):  # a generator that runs in the thread
                batches.close()

    return in_thread(produce, config.run.prefetch, limit, end)


def in_thread(
    produce: Callable[[], Generator[Any, None, None]],
    ahead: int,
    limit: float = 0,
    end: Callable[[], object] = lambda: None,
) -> Generator[Any, None, None]:
    """Yields the items of `produce()`, run in another thread at most `ahead` items ahead; its errors are raised here.

    Closing the generator ends the thread: it calls `end()`, which must end a wait in `produce`, and leaves a thread
    that is still stuck in a read.

    Raises:
      Stalled: an item takes more than `limit` seconds; 0: no limit.
    """
    ready: queue.Queue = queue.Queue(maxsize=max(ahead, 1))
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        items = produce()
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer
            put((None, error))
        finally:
            items.close()
            end()

    thread = threading.Thread(target=work, name="input", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = ready.get(timeout=limit or None)
            except queue.Empty:
                raise Stalled from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        end()
        thread.join(timeout=CLOSING)
