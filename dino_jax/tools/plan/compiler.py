"""Compiles the train step, also for devices that this machine does not have."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.parallel import sharding
from dino_jax.training.step import (
    TrainState,
    abstract_inputs,
    abstract_state,
    check_batch,
    jit_train_step,
    make_recipe,
)

# Needed by libtpu on a machine without TPUs: no metadata lookup, no lock, no log.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1, cpu, cpu:8 or gpu"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """The compiler's figures for one device's share of a step."""

    flops: float  # a loop's body counts once
    bytes: float  # read and written, likewise
    arguments: int  # state and crops
    temporary: int
    peak: int
    text: str  # the optimized HLO; empty if the program does not fit
    seconds: float


def is_present(topology: str) -> bool:
    """Whether a topology names devices of this machine: `cpu`, `cpu:8`, `gpu`."""
    return topology.partition(":")[0] in ("cpu", "gpu")


def prepare(topologies: Sequence[str]) -> None:
    """Configures JAX before its first use of a device. A plan for TPUs uses none of this machine's devices."""
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kinds = {topology.partition(":")[0] for topology in topologies}
    if "gpu" not in kinds:
        jax.config.update("jax_platforms", "cpu")
    counts = [int(t[4:]) for t in topologies if t.startswith("cpu:") and t[4:].isdigit()]
    if counts and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # devices are in use already; `devices_of` checks their number
            jax.config.update("jax_num_cpu_devices", max(counts))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as `v5e:4x4`, `cpu:8` or `gpu`.

    Raises:
      UserError: libtpu is missing or does not know the topology; this machine has too few devices.
    """
    if is_present(topology):
        return _present(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: compiling for TPUs needs libtpu (but no TPU): "
            'pip install -e ".[tpu]" -c constraints.txt'
        )
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology={topology}: {reason}: give one such as {EXAMPLES}") from error


def _present(topology: str) -> list[Any]:
    kind, _, count = topology.partition(":")
    if count and not (count.isdigit() and int(count)):
        raise UserError(f"--topology={topology}: {count!r} is not a number of devices: give one such as {EXAMPLES}")
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        raise UserError(
            f"--topology={topology}: JAX finds no {kind} here; a TPU topology needs no TPU ({EXAMPLES})"
        ) from None
    if count and int(count) > len(devices):
        raise UserError(f"--topology={topology}: this machine has {len(devices)}: give at most {kind}:{len(devices)}")
    return devices[: int(count)] if count else devices


def abstract_step(config: ConfigDict, devices: Sequence[Any], steps_per_epoch: int) -> tuple[Mesh, TrainState, Any]:
    """The mesh, the state's shapes and shardings, and the lowered step (`jax.stages.Lowered`), as in training.

    Raises `UserError` for a mesh or batch that does not fit the devices.
    """
    if devices[0].platform != jax.default_backend():  # `auto` would look at this machine's devices
        config = config.copy_and_resolve_references()
        config.run.attention = "plain"
    mesh = sharding.make_mesh(config.run.mesh, devices)
    recipe = make_recipe(config, steps_per_epoch)
    check_batch(recipe, mesh)
    state = abstract_state(recipe, mesh)
    step: Any = jit_train_step(recipe, mesh)
    return mesh, state, step.lower(state, abstract_inputs(recipe))


def compile_step(lowered: Any, state_bytes: int = 0) -> Program:
    """Compiles a lowered step. One that does not fit the memory gives a `Program` without text, FLOPs and bytes.

    `state_bytes`: of a device, for compiler errors that name only the temporaries.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (peak := _refused(str(error), state_bytes)) is None:
            raise
        return Program(0, 0, 0, 0, peak, "", time.perf_counter() - begin)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state is donated
    peak = arguments + outputs + temporary + memory.generated_code_size_in_bytes
    seconds = time.perf_counter() - begin
    return Program(cost["flops"], cost["bytes accessed"], arguments, temporary, peak, compiled.as_text(), seconds)


def _refused(message: str, state_bytes: int) -> int | None:
    """The bytes that a program would have needed, from libtpu's error; None for any other error."""
    for pattern, more in ((r"Used {} of {} hbm", 0), (r"HLO temporaries \({}\) exceeds", state_bytes)):
        if found := re.search(pattern.replace("{}", r"([\d.]+)([KMGT]?)"), message):
            return int(float(found[1]) * _UNITS[found[2]]) + more
    return None


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a pytree of sharded `ShapeDtypeStruct`s."""
    return sum(_shard_bytes(x) for x in jax.tree.leaves(tree))


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    size = 1
    for n in x.sharding.shard_shape(x.shape):
        size *= n
    return size * x.dtype.itemsize


def whole_bytes(tree: Any) -> int:
    """Bytes of a pytree of arrays, unsharded."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
