"""The device mesh, shardings by logical axes, and arrays from the host to devices. Knows nothing of DINO.

A model names the *logical* axes of its arrays (`batch`, `prototypes`, ...); `LogicalAxes` maps them to
*mesh* axes. Data parallelism is the default and all that most runs need.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "model")


@dataclasses.dataclass(frozen=True)
class LogicalAxes:
    """Logical axis -> mesh axes. `None` replicates."""

    batch: tuple[str, ...] = ("data", "fsdp")
    parameters: tuple[str, ...] = ("fsdp",)  # on the longest divisible axis of every large parameter
    prototypes: tuple[str, ...] = ("model",)

    def spec(self, *names: str | None) -> PartitionSpec:
        """The `PartitionSpec` of an array whose axes have these logical names."""
        return PartitionSpec(*(None if name is None else getattr(self, name) for name in names))


AXES = LogicalAxes()


def make_mesh(sizes: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `model`; `sizes` gives each, with -1 for the rest (`config.run.mesh`).

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


def state_shardings(
    abstract: Any, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, tuple[str | None, ...]]]
) -> Any:
    """A sharding for every array of a state (a pytree of shapes).

    `rules` pairs a regular expression, searched in the array's path, with the logical names of its leading axes. An
    `fsdp` axis of the mesh shards the longest remaining axis that it divides.
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


def _divides(size: int, name: str | None, mesh: Mesh | AbstractMesh) -> str | None:
    """The logical name, if its mesh axes divide an axis of this size; else None (replicated)."""
    if name is None:
        return None
    return name if size % math.prod(mesh.shape[axis] for axis in getattr(AXES, name)) == 0 else None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding by logical names, over the mesh of the context; without a mesh does nothing.

    Under `shard_map` only the axes left to the partitioner count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    return jax.lax.with_sharding_constraint(x, _only(AXES.spec(*names), free))


def _only(spec: PartitionSpec, mesh_axes: Sequence[str]) -> PartitionSpec:
    """The part of a spec on these mesh axes."""
    held = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    return PartitionSpec(*(tuple(axis for axis in axes if axis in mesh_axes) or None for axes in held))


def row_specs(shardings: Any) -> Any:
    """The specs of `shardings` on the mesh axes that hold rows, for `shard_map` over these axes."""
    return jax.tree.map(lambda s: _only(s.spec, AXES.batch), shardings)


def gather(tree: Any, specs: Any) -> Any:
    """Whole arrays from the shards that `row_specs` describes, under `shard_map` over the row axes."""

    def whole(x, spec):
        for axis, names in enumerate(spec):
            if names:
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    return jax.tree.map(whole, tree, specs)


def mean_over_rows(tree: Any) -> Any:
    """The mean over the devices along the row axes, on each of them, under `shard_map` over these axes."""
    return jax.tree.map(lambda x: jax.lax.pmean(x, AXES.batch), tree)


def row_axes() -> tuple[str, ...]:
    """The axes that rows are spread over in the enclosing `shard_map`; outside of one, none: arrays are whole there."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in AXES.batch if axis in manual)


def scatter_mean(tree: Any, specs: Any) -> Any:
    """As `mean_over_rows`, but each device keeps only its shard; the inverse of `gather`."""

    def mean(x, spec):
        rest = tuple(axis for axis in AXES.batch if jax.lax.axis_size(axis) > 1)
        ways = math.prod(jax.lax.axis_size(axis) for axis in rest)
        for axis, names in enumerate(spec):
            if names:
                x = jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
                rest = tuple(name for name in rest if name not in names)
        return (jax.lax.psum(x, rest) if rest else x) / ways

    return jax.tree.map(mean, tree, specs)


def local_rows(batch_size: int, mesh: Mesh) -> tuple[NamedSharding, np.ndarray]:
    """How a batch's rows lie on this process's devices, and which rows of the global batch they are.

    A mesh follows the links between chips, so on a pod the rows of a process need not be adjacent in the batch.
    """
    devices: dict[int, list[jax.Device]] = {}  # by first row; several where the mesh has axes without rows
    for device, index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).items():
        assert index is not None
        devices.setdefault(index[0].start or 0, []).append(device)
    starts, each = sorted(devices), batch_size // math.prod(mesh.shape[axis] for axis in AXES.batch)
    here = Mesh(np.array([devices[start] for start in starts]), ("rows", "copies"))
    return NamedSharding(here, PartitionSpec("rows")), np.concatenate([np.arange(s, s + each) for s in starts])


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process must load, in the order that `to_devices` takes."""
    return local_rows(batch_size, mesh)[1]


def of_all(x: jax.Array, mesh: Mesh, batch_size: int) -> jax.Array:
    """Rows [rows, ...] laid out by `local_rows` as this process's part of the global [batch_size, ...]; no copy."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays((batch_size, *x.shape[1:]), batch_sharding(mesh), shards)


def to_devices(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """A pytree of this process's rows, `np.ndarray` [rows, ...] -> global arrays [batch_size, ...] over the mesh."""
    here, _ = local_rows(batch_size, mesh)
    return jax.tree.map(lambda x: of_all(jax.device_put(x, here), mesh, batch_size), batch)
