"""Advice for a plan that does not fit or wastes the chips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

if TYPE_CHECKING:
    from dino_jax.tools.plan import Plan

ROOM = 0.9  # share of the memory to aim at


def advice(said: Plan, config: ConfigDict) -> Iterator[str]:
    """Yields lines of advice, each with the flag to set."""
    if not said.fits:
        yield from _make_it_fit(said, config)
    if said.dtype == "float32" and said.device.startswith(("TPU", "NVIDIA")):
        yield "model.dtype=float32 doubles activations and their traffic: plan with --config.model.dtype=bfloat16 too"


def _make_it_fit(said: Plan, config: ConfigDict) -> Iterator[str]:
    room, state = ROOM * said.hbm_bytes, said.parameter_bytes + said.teacher_bytes + said.optimizer_bytes
    rows = said.images_per_device / said.accum_steps
    yield f"to make it fit ({(said.peak_bytes - said.hbm_bytes) / 2**30:.1f} GiB too much), in this order:"
    if config.run.remat == "none":
        yield "  --config.run.remat=blocks: keeps only each block's input; about a third more FLOPs"
    if state > 0.5 * room:
        yield f"  --config.run.mesh.fsdp={said.devices}: shards a state of {state / 2**30:.1f} GiB"
    logits = 4 * rows * (2 + config.crops.local_count) * config.head.out_dim / said.mesh["model"]
    if logits > 0.1 * room:
        yield (
            f"  --config.run.mesh.model={2 * said.mesh['model']}: a copy of the logits takes {logits / 2**30:.1f} GiB; "
            "this shards the prototypes"
        )
    if (steps := _accumulation(said, room, state)) is not None:
        yield f"  --config.run.accum_steps={steps}: {said.images_per_device / steps:g} images at a time"
    ways = said.mesh["data"] * said.mesh["fsdp"]
    yield (
        f"  more devices: {said.images_per_device:g} images a device now; or a batch_size below {said.batch_size}, "
        f"in multiples of {ways}"
    )


def _accumulation(said: Plan, room: float, state: int) -> int | None:
    """The fewest microbatches (a divisor of the device's images) for which the activations should fit."""
    grads = said.parameter_bytes  # their sum over microbatches
    free, activations = room - state - grads, said.peak_bytes - state
    if free <= 0:
        return None
    rows = int(said.images_per_device)
    wanted = said.accum_steps * activations / free
    return next((n for n in range(said.accum_steps + 1, rows + 1) if rows % n == 0 and n >= wanted), None)
