"""Published figures of chips: what a roofline needs."""

from __future__ import annotations

import dataclasses
import os

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The vendor's figures of one chip."""

    name: str
    hbm_bytes: float
    flops: float  # peak per second, bfloat16, dense
    bandwidth: float  # memory bandwidth, bytes/s
    links: float  # to other chips, bytes/s, both directions together
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
# Keys are prefixes of JAX's `device_kind`; a longer prefix comes before a shorter one that it starts with.
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1200e9, 600e9, f"{_TPU}/v4"),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 400e9, f"{_TPU}/v5e"),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 1200e9, f"{_TPU}/v5p"),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1638e9, 800e9, f"{_TPU}/v6e"),
    "TPU7x": Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 1200e9, f"{_TPU}/tpu7x"),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 40e9, 312e12, 1555e9, 600e9, f"{_NVIDIA}/a100"),
    "NVIDIA A100": Chip("A100 80 GB", 80e9, 312e12, 2039e9, 600e9, f"{_NVIDIA}/a100"),
    "NVIDIA H200": Chip("H200", 141e9, 989e12, 4800e9, 900e9, f"{_NVIDIA}/h200"),
    "NVIDIA H100 80GB": Chip("H100 SXM", 80e9, 989e12, 3350e9, 900e9, f"{_NVIDIA}/h100"),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX `device_kind`; None if it is not in the table (or a CPU)."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)


def host_memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
