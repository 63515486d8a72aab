"""Batches for the loop, which end with a signal, a stall or a worker that dies."""

from __future__ import annotations

from collections.abc import Generator

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.data.sources import Source
from dino_jax.data.workers import WorkerDied
from dino_jax.errors import Failure, UserError
from dino_jax.models.network import Views
from dino_jax.parallel import distributed
from dino_jax.training.metrics import Throughput
from dino_jax.training.prefetch import BadFiles, Ready, Stalled, device_batches
from dino_jax.training.stop import Interrupted, StopSignal


class InputError(Exception):
    """The input failed with `cause`; the state can be saved."""

    def __init__(self, cause: UserError):
        super().__init__(str(cause))
        self.cause = cause


class Feed:
    """The inputs of a run's steps, from `start` on; unreadable images go to `bad_files.txt`."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, source: Source, mesh: Mesh, throughput: Throughput):
        self._config, self._source, self._mesh, self._throughput = config, source, mesh, throughput
        self._bad_files = BadFiles(workdir)
        self._limit = config.run.stall_timeout
        self._batches: Generator[Ready, None, None] | None = None

    def start(self, step: int, salt: int) -> None:
        """Begins with the input of the step after `step`."""
        self.close()
        limit = 0 if distributed.several() else self._limit
        self._batches = device_batches(
            self._config,
            self._source,
            self._mesh,
            position=step * self._config.batch_size,
            salt=salt,
            limit=limit,
        )

    def close(self) -> None:
        """Ends the threads and processes that read."""
        if self._batches is not None:
            self._batches.close()

    def inputs(self, step: int, stop: StopSignal) -> Views:
        """The inputs of `step`, which is the next one.

        Several processes neither leave the step nor save before they agree on it: there, errors and `bounded` end all.

        Raises:
          Interrupted: a signal came first.
          InputError: the input failed or stalled.
        """
        assert self._batches is not None
        what = f"the input of step {step}"
        if distributed.several():
            with self._throughput.waiting(), distributed.bounded(what, self._limit):
                batch = next(self._batches)
        else:
            try:
                with self._throughput.waiting(), stop.interrupting():
                    batch = next(self._batches)
            except Stalled:
                raise InputError(
                    Failure(f"waited {self._limit:g} s for {what} (run.stall_timeout): can it be read?")
                ) from None
            except UserError as error:
                if isinstance(error, WorkerDied) and stop.soon():
                    raise Interrupted from error
                raise InputError(error) from error
        self._bad_files.note(batch.bad)
        return batch.inputs
