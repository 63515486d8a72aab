"""What this machine is and has: Python, packages, devices, memory, disk, file handles. Checks for `dino-jax doctor`.

Nothing is downloaded or installed. The accelerator is asked in a process of its own, because one that hangs or aborts
must not take the answer along.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dino_jax import config_io
from dino_jax.data.storage import is_remote
from dino_jax.errors import UserError

T = TypeVar("T")
ROOT = pathlib.Path(__file__).parents[2]
PYTHONS = ((3, 11), (3, 13))  # oldest and newest that constraints.txt covers
GIB = 2**30
PROBE_SECONDS = 120.0  # for the devices to answer
PROBE = "import sys; from dino_jax.tools.machine import probe; probe(sys.stdin.read())"


class Check(NamedTuple):
    """One line of the answer."""

    name: str
    state: str  # ok, warn, missing
    found: str
    fix: str = ""


def python() -> Check:
    version = platform.python_version()
    low, high = (".".join(map(str, v)) for v in PYTHONS)
    if sys.version_info < PYTHONS[0]:
        return Check("python", "missing", version, f"install Python {low} to {high}")
    if sys.version_info[:2] > PYTHONS[1]:
        return Check("python", "warn", version, f"untried here; {low} to {high} are tested")
    return Check("python", "ok", f"{version} at {sys.executable}")


def packages() -> Iterator[Check]:
    """The required packages, and how they compare with constraints.txt, where the checkout is at hand."""
    try:
        needed = importlib.metadata.requires("dino-jax") or []
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install -e . -c constraints.txt, in the checkout"
        yield Check("packages", "warn", "dino-jax runs from its folder, not installed: its packages are not known", fix)
        return
    absent: list[str] = []
    other: list[str] = []
    pins = pinned(ROOT / "constraints.txt")
    required = [one for one in map(Requirement, needed) if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in required:
        name = canonicalize_name(one.name)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if not one.specifier.contains(version, prereleases=True):
            absent.append(f"{name}{one.specifier} (is {version})")
        elif pins.get(name, version) != Version(version).public:
            other.append(f"{name} {version} (tested: {pins[name]})")
    if absent:
        yield Check("packages", "missing", ", ".join(absent), f"pip install -c constraints.txt {' '.join(absent)}")
    elif other:
        fix = "pip install -c constraints.txt brings the tested versions"
        yield Check("packages", "warn", few(other), fix)
    else:
        yield Check("packages", "ok", f"{len(required)} packages{', all as in constraints.txt' if pins else ''}")


def pinned(path: pathlib.Path, python: Sequence[int] = sys.version_info[:2]) -> dict[str, str]:
    """The pins of a constraints file that apply to this Python: name -> version. Empty where there is no file."""
    pins: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if not line.partition("#")[0].strip():
            continue
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"python_version": ".".join(map(str, python))}):
            pins[canonicalize_name(one.name)] = str(one.specifier).removeprefix("==")
    return pins


def hardware(root: pathlib.Path = pathlib.Path("/")) -> str | None:
    """tpu or gpu, where the machine has one, from its device files alone."""
    google = any(path.read_text().strip() == "0x1ae0" for path in root.glob("sys/bus/pci/devices/*/vendor"))
    if any(root.glob("dev/accel[0-9]*")) or (google and any(root.glob("dev/vfio/[0-9]*"))):
        return "tpu"
    if any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl", "dxg")):
        return "gpu"
    return None


def devices(config_json: str = "") -> Iterator[Check]:
    """Whether JAX finds the hardware that is there, and whether each device multiplies two small matrices rightly."""
    there = hardware()
    package, extra = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda")}.get(there or "", ("jax", ""))
    if there and importlib.util.find_spec(package) is None:
        fix = f'pip install "dino-jax[{extra}]" -c constraints.txt'
        yield Check("devices", "missing", f"a {there.upper()} is here, and no {package}", fix)
        return
    answer, reason = _ask(config_json)
    if answer is None:
        busy = {
            "tpu": "end the process that holds the TPU (sudo lsof /dev/accel* /dev/vfio/*)",
            "gpu": "see nvidia-smi",
        }
        fix = busy.get(there or "", "see the message")
        if there == "tpu":
            fix += "; on a slice of several hosts ask on all of them at once"
        yield Check("devices", "missing", f"no answer: {reason}", fix)
        return
    found = f"{answer['count']} {answer['kind']}, JAX {answer['jax']}; answered in {answer['seconds']:.1f} s"
    if answer["wrong"]:
        yield Check("devices", "missing", f"{answer['wrong']} multiplies wrongly", "leave out or replace that device")
    elif there and answer["platform"] == "cpu":
        fix = f"unset JAX_PLATFORMS (it is {os.environ.get('JAX_PLATFORMS', '')!r}) or see why JAX passes over it"
        yield Check("devices", "warn", f"{found}: the {there.upper()} that is here is not used", fix)
    else:
        yield Check("devices", "ok", found)
    if answer.get("refused"):
        yield Check("model", "missing", answer["refused"], "fix the key, then ask again")


def _ask(config_json: str) -> tuple[dict[str, Any] | None, str]:
    """What `probe` says in a process of its own, or None and the reason."""
    try:
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(
            command, input=config_json, capture_output=True, text=True, timeout=PROBE_SECONDS, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return None, f"nothing came in {PROBE_SECONDS:.0f} s"
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line), ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None, lines[-1] if lines else f"the process ended with status {done.returncode}"


def probe(config_json: str) -> None:
    """Prints what the devices answer as one JSON line; with a configuration, whether its model can be made."""
    import time

    import jax
    import jax.numpy as jnp

    start = time.monotonic()
    wrong = [
        str(d) for d in jax.local_devices() if float((jax.device_put(jnp.eye(128), d) @ jnp.eye(128)).sum()) != 128
    ]
    devices = jax.devices()
    answer = {
        "count": len(devices),
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "jax": jax.__version__,
        "wrong": ", ".join(wrong),
        "seconds": time.monotonic() - start,
    }
    if config_json:
        from dino_jax.training.step import make_recipe

        try:
            make_recipe(config_io.from_json(config_json), 1000)
        except Exception as error:
            answer["refused"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    print(json.dumps(answer))


def memory() -> Check:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+)", lines)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return Check("memory", "ok", "not known on this system")
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Check("memory", "missing", found, "end other programs, or take a larger machine: 1 GiB is the least")
    if free < 4 * GIB:
        return Check("memory", "warn", found, "fewer run.workers and run.prefetch, if the run is killed for memory")
    return Check("memory", "ok", found)


def disk(workdir: str | None) -> Check:
    """Space where checkpoints go, or for temporary files where they go to a bucket."""
    remote = workdir is not None and is_remote(workdir)
    place = existing(pathlib.Path(workdir or ".").expanduser()) if not remote else pathlib.Path(".")
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {place.resolve()}"
    if free < GIB:
        return Check("disk", "missing", found, "free some, or give another --workdir")
    if free < 5 * GIB and not remote:
        return Check(
            "disk", "warn", found, "a checkpoint of a large model takes gigabytes: lower run.keep, or free some"
        )
    return Check("disk", "ok", found)


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def files() -> Check:
    """File handles: readers, workers and storage clients take hundreds."""
    try:
        import resource
    except ImportError:
        return Check("files", "ok", "not limited on this system")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    taken = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    free = math.inf if limit == resource.RLIM_INFINITY else limit - taken
    state = "missing" if free < 128 else "warn" if free < 1000 else "ok"
    return Check("files", state, f"{free} file handles free", "" if state == "ok" else "ulimit -n 65536")


def within(seconds: float, action: Callable[[], T]) -> T:
    """`action()`, its exceptions too, or TimeoutError after so long; the thread that hangs ends with the process."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, action()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    good, value = outcome[0]
    if not good:
        raise value
    return value


def line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def few(items: Sequence[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
