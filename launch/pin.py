"""Rewrites constraints.txt: the exact version of every direct and transitive dependency, for each Python.

    python3 launch/pin.py python3.11 python3.12 python3.13

Each interpreter resolves the newest versions and installs none of them; it takes minutes, most of them on the network.
Pins that differ get a marker; those of the last interpreter serve later ones too. No index address is written. Only
the standard library is used, since it runs before there is an environment.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ("hatchling", "editables")  # what an editable installation needs besides pyproject's own lists
EXTRAS = "cuda,export,hf,test,tiff,tpu,wandb"
# Installed with --no-deps: one wants an older Orbax, for parts that are not used, the other a second OpenCV.
ALONE = ("jax2onnx", "vos-benchmark")
# Of torch's wheels on the package index, not of its CPU build, which the tests use.
CUDA_OF_TORCH = ("nvidia-", "cuda-", "triton")
HEADER = """\
# Exact versions for each Python, written by launch/pin.py; see CONTRIBUTING.md. Use: pip install -c constraints.txt ...
"""


def main(interpreters: list[str]) -> None:
    """Resolves with every interpreter and writes the pins, sorted by name."""
    if not interpreters:
        sys.exit(__doc__)
    pins = dict(resolve(interpreter) for interpreter in interpreters)
    pythons = sorted(pins, key=minor)
    names = sorted(set().union(*pins.values()))
    lines = [line for name in names for line in lines_of(name, [pins[python].get(name) for python in pythons], pythons)]
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n")


def resolve(interpreter: str) -> tuple[str, dict[str, str]]:
    """The interpreter's version as "3.12", and the version of every package it would install."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", "-U", "pip"], check=True)
        pins = report(python, folder, [*BUILD, f"{ROOT}[{EXTRAS}]"])
        pins |= report(python, folder, ["--no-deps", *ALONE])
        fixed = pathlib.Path(folder, "fixed.txt")
        fixed.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        peers = report(python, folder, ["-c", str(fixed), f"{ROOT}[peers]"])
        pins |= {name: version for name, version in peers.items() if not name.startswith(CUDA_OF_TORCH)}
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"Python {version}: {len(pins)} packages", flush=True)
    return version, pins


def report(python: str, folder: str, arguments: list[str]) -> dict[str, str]:
    """What pip would install for these arguments: normalized name -> public version."""
    path = pathlib.Path(folder, "report.json")
    lazy = ["--dry-run", "--use-feature=fast-deps"]  # reads the metadata of wheels, not gigabytes of them
    command = [python, "-m", "pip", "install", "-q", *lazy, "--ignore-installed", "--report", str(path)]
    subprocess.run([*command, *arguments], check=True)
    found = {}
    for item in json.loads(path.read_text())["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        found[name] = item["metadata"]["version"].partition("+")[0]
    found.pop("dino-jax", None)
    return found


def lines_of(name: str, versions: list[str | None], pythons: list[str]) -> list[str]:
    """The constraints of one package: adjacent Pythons with the same version share a line."""
    lines, start = [], 0
    for stop in range(1, len(pythons) + 1):
        if stop < len(pythons) and versions[stop] == versions[start]:
            continue
        if versions[start] is not None:
            marker = marker_of(pythons, start, stop)
            lines.append(f"{name}=={versions[start]}" + (f" ; {marker}" if marker else ""))
        start = stop
    return lines


def marker_of(pythons: list[str], start: int, stop: int) -> str:
    """The environment marker for pythons[start:stop]; the outer ends are open."""
    bounds = []
    if start > 0:
        bounds.append(f'python_version >= "{pythons[start]}"')
    if stop < len(pythons):
        bounds.append(f'python_version < "{pythons[stop]}"')
    return " and ".join(bounds)


def minor(python: str) -> int:
    return int(python.partition(".")[2])


if __name__ == "__main__":
    main(sys.argv[1:])
