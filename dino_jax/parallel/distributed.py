"""Runs of several processes: joining, checks at the start, stopping together, failing together.

Flags of `dino-jax train` and `dino-jax eval`, or the environment, tell which process this is:

    --coordinator=HOST:PORT   JAX_COORDINATOR_ADDRESS   where process 0 listens; the same for all
    --processes=N             JAX_NUM_PROCESSES         1: alone, whatever the environment says
    --process=I               JAX_PROCESS_ID            0 to N - 1; in a Kubernetes Job or JobSet (completionMode:
                                                        Indexed) JOB_COMPLETION_INDEX is enough
                              JAX_LOCAL_DEVICE_IDS      on a GPU machine with several processes: its own, as 0,1
    nothing                   SLURM_*                   under `srun` with more than one task
                              TPU_WORKER_HOSTNAMES ...  TPU pods and slices, on Compute Engine (metadata server) and GKE
                                                        (variables of its TPU webhook, MEGASCALE_*), by JAX itself

Seconds to wait before giving up:

    DINO_START_TIMEOUT        300   for all processes to come, and for each of the start-up checks
    DINO_HEARTBEAT_TIMEOUT     60   of silence before a process counts as dead and the runtime aborts the others

Exit status: 0 done, or stopped by SIGTERM or Ctrl-C with a checkpoint written (the same command resumes); 2 bad input,
a mismatch between processes among it; 1 any other failure of this process or another one. The reason is one line on
the standard error of the process that failed and of process 0.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax._src import distributed as runtime  # its client has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError
from dino_jax.parallel.coordination import ProcessGroup

log = logging.getLogger(__name__)

_group: ProcessGroup | None = None  # within a session of several processes


class Place(NamedTuple):
    """One process among those of a run."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int
    devices: list[int] | None = None  # of this machine's, by number; None: all of them


def find_place(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Place | None:
    """This process's place by flags, variables or SLURM; None if not given, as on a TPU, where JAX finds it.

    Raises:
      UserError: only some of the three values are given, or they make no sense.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _whole("JAX_NUM_PROCESSES", environ) if processes is None else processes
    process = _whole("JAX_PROCESS_ID", environ) if process is None else process
    if processes == 1:
        return Place("", 1, 0)
    if process is None and coordinator:
        process = _whole("JOB_COMPLETION_INDEX", environ)
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if all(value is None for value in given.values()):
        return _slurm(environ)
    if missing := [name for name, value in given.items() if value is None]:
        known = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise UserError(f"{known} without {' and '.join(missing)}: give all three to each process, or none")
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: of {processes} processes the numbers are 0 to {processes - 1}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: it must read HOST:PORT")
    devices = environ.get("JAX_LOCAL_DEVICE_IDS")
    return Place(coordinator, processes, process, [int(d) for d in devices.split(",")] if devices else None)


def _whole(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise UserError(f"{name}={text}: it must be a whole number")
    return int(text)


def _seconds(name: str, default: float, environ: Mapping[str, str]) -> float:
    """A time limit; `UserError` unless it is between 1 second and a week."""
    text = environ.get(name, "").strip() or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 7 * 86400:
        raise UserError(f"{name}={text}: it must be a number of seconds, 1 to 604800")
    return seconds


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """The place of a task of `srun`; None outside of SLURM or for a single task."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in names):
        return None
    job, tasks, process, local = (int(environ[names[i]]) for i in (0, 2, 3, 4))
    here = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    bound = environ.get("CUDA_VISIBLE_DEVICES", ",")
    # One process on a machine has all its GPUs; several have one each, unless SLURM already shows each only its own.
    devices = None if here == "1" or "," not in bound else [local]
    return Place(f"{first_host(environ['SLURM_STEP_NODELIST'])}:{20000 + job % 20000}", tasks, process, devices)


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed host list: `tpu[003-005,9],login` -> `tpu003`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # commas within brackets do not separate hosts
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips and JAX is going to use them."""
    wanted = environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool("tpu" in wanted and chips and importlib.util.find_spec("libtpu"))


@contextlib.contextmanager
def session(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """Joins the other processes of the run, if there are any (see the module).

    A single process is unaffected. With several, one that fails tells the others, and all exit.
    """
    global _group
    _group = _join(find_place(coordinator, processes, process, os.environ))
    if _group is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        _group.fail(error)
    _group.end()
    _group = None


def several() -> bool:
    """Whether this is one of several processes."""
    return _group is not None


def check_alone(verb: str) -> None:
    """Raises `UserError` if the environment says that this is one of several processes."""
    place = find_place(None, None, None, os.environ)
    count = jax.process_count() if place is None else place.processes
    if count > 1:
        raise UserError(f"{verb} runs in one process, here are {count}: start it alone, or set JAX_NUM_PROCESSES=1")


def check_same(facts: Mapping[str, str]) -> None:
    """Raises the same `UserError` on every process unless all have the same facts; names who differs and how."""
    if _group is not None:
        _group.check_same(facts)


def check_devices() -> None:
    """Raises `UserError` unless every device of every process answers in time, alone and then all together."""
    if _group is not None:
        _group.check_devices()


def check_shared(folder: epath.Path) -> None:
    """Raises `UserError` if a process does not see in `folder` what process 0 writes there."""
    if _group is not None:
        _group.check_shared(folder)


@contextlib.contextmanager
def bounded(what: str, seconds: float) -> Iterator[None]:
    """Ends a run of several processes if the block takes longer, naming `what` it waits for; 0: no limit."""
    if _group is None or not seconds:
        yield
        return
    _group.waiting = what, time.monotonic(), seconds
    try:
        yield
    finally:
        _group.waiting = None


def lead() -> bool:
    """Whether this process writes and prints. Does not start a JAX backend."""
    return _group is None or _group.rank == 0


def _too_late(place: Place | None, patience: float) -> NoReturn:
    who, where = (f"process {place.process} of {place.processes}", place.coordinator) if place else ("this process", "")
    print(
        f"dino-jax: error: {who}: not all processes met{where and f' at {where}'} within {patience:.0f} s "
        "(DINO_START_TIMEOUT): is each of them running, and can it reach that port?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


class StopTogether:
    """Stops all processes after the same step when any of them gets a signal.

    At each step all processes reduce one number: whether a signal came. The reduction is dispatched after the step and
    read with its metrics. So all read the same answer at the same point of the loop, without extra waiting. In a single
    process a signal counts at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.reason: str | None = None  # once all agree to stop
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._several = jax.process_count() > 1
        self._silence: Any = self._array(0) if self._several else None

    def vote(self, number: int) -> jax.Array | int:
        """This process's vote: the signal `number` that asks it to stop, or 0. Pass the result to `count`."""
        if not self._several:
            self.count(number)
            return number
        return self._max(self._array(1 + number + 64 * jax.process_index()) if number else self._silence)

    def count(self, votes: jax.Array | int) -> None:
        """Reads the result of a step's vote; waits for the step."""
        if (found := int(votes)) and self.reason is None:
            process, number = divmod(found - self._several, 64)
            at = f" (process {process})" if self._several else ""
            self.reason = signal.Signals(number).name + at

    def _array(self, value: int) -> jax.Array:
        count = self._place.mesh.size
        return jax.make_array_from_callback((count,), self._place, lambda _: np.full(1, value, np.int32))


def _join(place: Place | None) -> ProcessGroup | None:
    """Starts JAX's runtime for several processes and returns their group; None: alone."""
    if place.processes == 1 if place else not _on_tpu(os.environ):
        return None
    patience = _seconds("DINO_START_TIMEOUT", 300, os.environ)
    heartbeat = _seconds("DINO_HEARTBEAT_TIMEOUT", 60, os.environ)
    # JAX's preemption service would take SIGTERM for itself; the loop handles it (StopTogether).
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {
        "initialization_timeout": int(patience) + 60,  # after this the runtime would abort this process
        "heartbeat_timeout_seconds": int(heartbeat),
        "shutdown_timeout_seconds": 60,
    }
    if place is not None:
        options |= {"cluster_detection_method": "deactivate", "local_device_ids": place.devices}
        options |= {"coordinator_address": place.coordinator, "num_processes": place.processes}
        options |= {"process_id": place.process}
    timer = threading.Timer(patience, _too_late, (place, patience))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if place is None:  # a single TPU machine, without a pod's metadata
            log.info("a single TPU machine, as far as JAX can tell: %s", reason)
            return None
        raise UserError(f"process {place.process} cannot join at {place.coordinator}: {reason}") from error
    finally:
        timer.cancel()
    state = runtime.global_state
    if state.num_processes == 1:
        jax.distributed.shutdown()
        return None
    return ProcessGroup(state.process_id, state.num_processes, state.client, patience)
