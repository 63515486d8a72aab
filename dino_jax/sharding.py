"""Devices: the mesh, logical axes on mesh axes, and the way of arrays from the host. Knows nothing of DINO.

A model names the *logical* axes of its arrays (`batch`, `prototypes`, ...); `LogicalAxes` says on which *mesh* axes
they lie. Data parallelism is the default and the only thing most runs need.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "model")


@dataclasses.dataclass(frozen=True)
class LogicalAxes:
    """Logical axis -> mesh axes. `None` replicates."""

    batch: tuple[str, ...] = ("data", "fsdp")
    parameters: str = "fsdp"  # the longest axis it divides of every large parameter
    prototypes: str = "model"

    def spec(self, *names: str | None) -> PartitionSpec:
        """The `PartitionSpec` of an array whose axes have these logical names."""
        return PartitionSpec(*(None if name is None else getattr(self, name) for name in names))


AXES = LogicalAxes()


def make_mesh(sizes: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `model`; `sizes` gives each, with -1 for what remains (`config.run.mesh`).

    Without a -1 a single process may use fewer devices than it has: the first ones.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes[axis]) for axis in MESH_AXES]
    given = math.prod(n for n in shape if n != -1)
    if -1 not in shape and jax.process_count() == 1:
        devices = devices[:given]
    if shape.count(-1) > 1 or given < 1 or len(devices) % given or (-1 not in shape and given != len(devices)):
        raise UserError(
            f"run.mesh={dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(devices)} device(s): "
            "their product must be the number of devices; at most one axis may be -1 (the rest)"
        )
    shape = [len(devices) // given if n == -1 else n for n in shape]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all data-parallel devices."""
    return NamedSharding(mesh, AXES.spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises `UserError` unless the batch divides over the devices and the microbatches."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * microbatches):
        raise UserError(
            f"batch_size={batch_size} is not divisible by {ways} device(s) x run.accum_steps={microbatches}: "
            f"use a multiple of {ways * microbatches}"
        )


def state_shardings(abstract: Any, mesh: Mesh, rules: Sequence[tuple[str, tuple[str | None, ...]]]) -> Any:
    """A sharding for every array of a state (a pytree of shapes).

    `rules` pairs a regular expression, searched in the array's path, with the logical names of its leading axes. Where
    the mesh has an `fsdp` axis, the longest remaining axis that it divides is sharded over it.
    """

    def sharding(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes: list[str | None] = [None] * x.ndim
        for pattern, names in rules:
            if re.search(pattern, name) and x.ndim >= len(names):
                axes[: len(names)] = [_divides(x.shape[i], n, mesh) for i, n in enumerate(names)]
                break
        if mesh.shape["fsdp"] > 1 and x.size >= 2**12:
            free = [i for i in range(x.ndim) if axes[i] is None and x.shape[i] % mesh.shape["fsdp"] == 0]
            if free:
                axes[max(free, key=lambda i: x.shape[i])] = "parameters"
        return NamedSharding(mesh, AXES.spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def _divides(size: int, name: str | None, mesh: Mesh) -> str | None:
    """The logical name, where its mesh axes divide an axis of this size; else None (replicated)."""
    if name is None:
        return None
    axes = getattr(AXES, name)
    ways = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))
    return name if size % ways == 0 else None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """A sharding constraint by logical names, inside a function jitted over the mesh of the enclosing `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, AXES.spec(*names))


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a global batch that this process must load, from the sharding's own index map."""
    indices = [
        index[0] for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values() if index
    ]
    rows = sorted({(s.start or 0, batch_size if s.stop is None else s.stop) for s in indices})
    start, stop = rows[0][0], rows[-1][1]
    covered = sum(b - a for a, b in rows)
    if covered != stop - start:
        raise UserError(f"run.mesh gives this process rows {rows}, which are not contiguous: put processes on `data`")
    return slice(start, stop)


def to_devices(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """A pytree of this process's rows, `np.ndarray` [rows, ...] -> global arrays [batch_size, ...] over the mesh."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(put, batch)
