"""`dino-jax plan`: compile the train step for hardware you do not have. Does it fit, how fast can it be at best?

Everything is of one *device* in JAX's sense: a chip, save where the runtime shows each core of a chip as a device
(v4 without its cores joined, tpu7x); the chip's memory and speed are shared out between them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.tools.plan import compiler
from dino_jax.tools.plan.advice import advice
from dino_jax.tools.plan.chips import Chip, chip_of, host_memory
from dino_jax.tools.plan.flops import step_flops
from dino_jax.tools.plan.hlo import collectives

IMAGENET = 1_281_167  # training images of ImageNet-1k, the paper's data set


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one training run on one topology; sizes, FLOPs and bytes a device and step."""

    topology: str
    device: str  # JAX's device_kind
    devices: int
    hosts: int
    mesh: dict[str, int]
    model: str
    dtype: str
    batch_size: int
    images_per_device: float
    accum_steps: int
    remat: str
    parameter_bytes: int  # student
    teacher_bytes: int
    optimizer_bytes: int
    gradient_bytes: int  # of the whole student: what data parallelism has to reduce
    argument_bytes: int | None  # state and crops; like all that the compiler says, None if it did not fit
    temp_bytes: int | None  # activations, gradients and all that lives during a step
    peak_bytes: int  # arguments, outputs, temporaries and the program
    hbm_bytes: int
    fits: bool
    flops: float | None
    analytic_flops: float | None
    bytes: float | None  # read from and written to memory, as the compiler counts
    collectives: dict[str, dict[str, int]] | None  # kind -> count, bytes
    collective_bytes: int | None
    compute_ms: float | None  # None for a chip of unknown speed
    memory_ms: float | None
    links_ms: float | None
    roofline_step_ms: float | None  # the largest of the three: no step can be faster
    images_per_s: float | None  # of all devices, at the roofline, like the two below
    days: float | None  # for all epochs
    host_images_per_s: float | None  # what each host's input must reach
    images: int  # of the data set
    epochs: int
    compile_seconds: float
    advice: list[str]


def print_plans(config: ConfigDict, topologies: str, images: int | None = None) -> None:
    """Prints a plan for each of the topologies, separated by commas; then all as one line of JSON (see `to_json`)."""
    names = [name.strip() for name in topologies.split(",") if name.strip()]
    if not names:
        raise UserError(f"--topology={topologies}: give one such as {compiler.EXAMPLES}")
    compiler.prepare(names)
    plans = []
    for name in names:
        plans.append(plan(config, name, images))
        print(*report(plans[-1]), sep="\n", flush=True)
    print(to_json(plans))


def plan(config: ConfigDict, topology: str, images: int | None = None) -> Plan:
    """Compiles the train step of a configuration for a topology, and says what that tells.

    Args:
      config: as for training; `run.mesh`, `run.accum_steps`, `run.remat` and `model.dtype` count.
      topology: `v5e:4x4` and so on, as libtpu names them, without hardware; `cpu`, `cpu:8`, `gpu`: of this machine.
      images: images in the data set; None: as many as `data.train` has, or ImageNet's if it is not there.

    Raises:
      UserError: an unknown topology, no libtpu, a batch or mesh that does not fit.
    """
    devices = compiler.devices_of(topology)
    images = images or data_set_size(config)
    if images < config.batch_size:
        raise UserError(f"batch_size={config.batch_size} is more than the {images} images of the data set: lower it")
    epoch_steps = images // config.batch_size
    mesh, state, lowered = compiler.abstract_step(config, devices, epoch_steps)
    program = compiler.compile_step(lowered, compiler.shard_bytes(state))
    hosts = len({device.process_index for device in mesh.devices.flat})
    rows = config.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
    measured = _measured(config, program, state)
    chip, share, hbm = _chip_share(topology, devices)
    times = _times(chip, share, mesh.size, measured)
    step_ms = max(times) if times else None
    rate = config.batch_size / step_ms * 1e3 if step_ms else None
    said = Plan(
        topology=topology,
        device=devices[0].device_kind,
        devices=mesh.size,
        hosts=hosts,
        mesh=dict(mesh.shape),
        model=f"{config.model.name}/{config.model.patch_size}",
        dtype=config.model.dtype,
        batch_size=config.batch_size,
        images_per_device=rows,
        accum_steps=config.run.accum_steps,
        remat=config.run.remat,
        parameter_bytes=compiler.shard_bytes(state.student["params"]),
        teacher_bytes=compiler.shard_bytes(state.ema),
        optimizer_bytes=compiler.shard_bytes(state.opt_state),
        gradient_bytes=compiler.whole_bytes(state.student["params"]),
        peak_bytes=program.peak,
        hbm_bytes=hbm,
        fits=bool(program.text) and program.peak <= hbm,
        analytic_flops=step_flops(config, rows, mesh.shape["model"]),
        **measured,
        compute_ms=times[0] if times else None,
        memory_ms=times[1] if times else None,
        links_ms=times[2] if times else None,
        roofline_step_ms=step_ms,
        images_per_s=rate,
        days=config.epochs * epoch_steps * step_ms / 86.4e6 if step_ms else None,
        host_images_per_s=rate / hosts if rate else None,
        images=images,
        epochs=config.epochs,
        compile_seconds=program.seconds,
        advice=[],
    )
    return dataclasses.replace(said, advice=list(advice(said, config)))


def data_set_size(config: ConfigDict) -> int:
    """Images of `data.train` where it can be opened here; otherwise ImageNet-1k's."""
    if config.data.train.startswith("tfds:imagenet2012:train"):
        return IMAGENET
    try:
        return len(open_source(config.data.train))
    except (UserError, OSError, ImportError):
        return IMAGENET


def _measured(config: ConfigDict, program: compiler.Program, state: Any) -> dict[str, Any]:
    """What only a compiled program tells; all None where there is none.

    The compiler counts the body of the loop over microbatches once. What is outside it, the update, is at least one
    reading and one writing of the state, and few FLOPs.
    """
    names = ("argument_bytes", "temp_bytes", "flops", "bytes", "collectives", "collective_bytes")
    if not program.text:
        return dict.fromkeys(names)
    trips = config.run.accum_steps
    kinds = collectives(program.text, trips)
    traffic = trips * program.bytes - (trips - 1) * 2 * compiler.shard_bytes(state)
    values = (program.arguments, program.temporary, trips * program.flops, traffic, kinds)
    return dict(zip(names, (*values, sum(kind["bytes"] for kind in kinds.values())), strict=True))


def _chip_share(topology: str, devices: Sequence[Any]) -> tuple[Chip | None, float, int]:
    """The chip, the part of it that a device is, and the bytes of memory of a device."""
    chip = chip_of(devices[0].device_kind)
    if chip is None and topology.startswith("cpu"):
        return None, 1.0, host_memory() // len(devices)
    if chip is None:
        raise UserError(
            f"--topology={topology}: no published figures of {devices[0].device_kind!r} in "
            "dino_jax/tools/plan/chips.py: add them there"
        )
    share = 1 / len({getattr(device, "core_on_chip", 0) for device in devices})
    return chip, share, int(chip.hbm_bytes * share)


def _times(chip: Chip | None, share: float, devices: int, measured: dict[str, Any]) -> tuple[float, ...] | None:
    """Milliseconds that compute, memory and links need at their peaks; None where chip or program is unknown.

    Links: a reduction moves each byte out and in (2 (n - 1) / n), over both directions of all links at once.
    """
    if chip is None or measured["flops"] is None:
        return None
    moved = 2 * (devices - 1) / devices * 2 * measured["collective_bytes"]  # sent and received
    seconds = (
        measured["flops"] / (chip.flops * share),
        measured["bytes"] / (chip.bandwidth * share),
        moved / (chip.links * share),
    )
    return tuple(1e3 * s for s in seconds)


def to_json(plans: Sequence[Plan]) -> str:
    """One object for one topology, a list for several."""
    objects = [dataclasses.asdict(p) for p in plans]
    return json.dumps(objects[0] if len(objects) == 1 else objects)


def report(said: Plan) -> Iterator[str]:
    """The lines for a person."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in said.mesh.items() if n > 1) or "one device"
    yield (
        f"{said.topology}: {said.devices} x {said.device} on {said.hosts} host(s), {mesh}; {said.model} in "
        f"{said.dtype}, batch {said.batch_size}: {said.images_per_device:g} images a device, "
        f"run.accum_steps={said.accum_steps}, run.remat={said.remat}"
    )
    verdict = "fits" if said.fits else "DOES NOT FIT"
    yield f"  memory a device   {_bytes(said.peak_bytes)} at the peak of {_bytes(said.hbm_bytes)}: {verdict}"
    yield (
        f"    student {_bytes(said.parameter_bytes)}, teacher {_bytes(said.teacher_bytes)}, optimizer "
        f"{_bytes(said.optimizer_bytes)}; activations and other temporaries {_bytes(said.temp_bytes)}"
    )
    analytic = "no count for this backbone" if said.analytic_flops is None else _flops(said.analytic_flops)
    yield f"  FLOPs a device    {_flops(said.flops)} compiled, {analytic} analytic (matrix products)"
    yield f"  memory traffic    {_bytes(said.bytes)} accessed"
    for kind, entry in (said.collectives or {}).items():
        gradients = f" (gradients: {_bytes(said.gradient_bytes)})" if kind == "all-reduce" else ""
        yield f"  {kind:<17} {entry['count']} x, {_bytes(entry['bytes'])} in all{gradients}"
    if said.roofline_step_ms:
        yield (
            f"  roofline          {said.roofline_step_ms:.1f} ms a step (compute {said.compute_ms:.1f}, memory "
            f"{said.memory_ms:.1f}, links {said.links_ms:.1f}): at most {said.images_per_s:,.0f} images/s"
        )
        yield (
            f"  run               {said.days:.2f} days at that rate for {said.epochs} epochs of {said.images:,} "
            f"images; each host's input must reach {said.host_images_per_s:,.0f} images/s"
        )
    yield f"  compiled in       {said.compile_seconds:.0f} s"
    yield from (f"  {line}" for line in said.advice)


def _bytes(n: float | None) -> str:
    if n is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.4g} {unit}"
        n /= 1024
    raise AssertionError


def _flops(n: float | None) -> str:
    return "unknown" if n is None else f"{n / 1e12:.3g} T" if n >= 1e11 else f"{n / 1e9:.3g} G"
