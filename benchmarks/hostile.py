"""Trains on, packs and embeds a folder of hostile files, and measures the memory of every process.

    python benchmarks/hostile.py [--folder=DIR]

The folder holds 64 good images; a named pipe, a link to a device, a loop of links, a socket, an unreadable folder;
images that claim or unpack to gigabytes; and 450 damaged ones: cuts, flipped and inserted bytes of nine formats. Prints
a line a command: its status, the images it left out, the largest resident memory of any process, seconds. Ends with
status 1 if a command fails, prints a traceback, or needs more than 2 GB.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
LIMIT = 2.0  # GB
TINY = (
    *("--config=quickstart", "--config.model.embed_dim=32", "--config.model.heads=2", "--config.model.patch_size=8"),
    *("--config.head.out_dim=256", "--config.head.hidden_dim=64", "--config.head.bottleneck_dim=32"),
    *("--config.crops.global_size=32", "--config.crops.local_size=16", "--config.batch_size=64", "--config.epochs=2"),
    *("--config.optim.warmup_epochs=0", "--config.data.max_bad_share=1.0", "--config.data.canvas=64"),
    *("--config.run.tensorboard=False", "--config.run.progress=False", "--config.run.log_every=1"),
)


def encoded(form: str, rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(file, form)
    return file.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with flipped bytes, or with inserted ones."""
    kind, place = rng.integers(3), int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        changed = bytearray(data)
        for at in rng.integers(len(data), size=1 + len(data) // 50):
            changed[at] ^= int(rng.integers(1, 256))
        return bytes(changed)
    return data[:place] + rng.bytes(int(rng.integers(1, 200))) + data[place:]


def png(width: int, height: int, color: int, levels: int = 0) -> bytes:
    """A PNG of one value that claims `width` x `height`; `levels`: of a palette with transparency."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" * (1 + width * (3 if color == 2 else 1))
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    palette = chunk(b"PLTE", bytes(3 * levels)) + chunk(b"tRNS", bytes(levels)) if levels else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def fill(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(64):
        (folder / f"good{i}.png").write_bytes(encoded("PNG", rng))
    for i in range(450):
        form = FORMATS[i % len(FORMATS)]
        suffix = SUFFIXES.get(form, f".{form.lower()}")
        (folder / f"damaged{i}{suffix}").write_bytes(damaged(encoded(form, rng), rng))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "not a file.png").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(folder / "socket.png"))
    (folder / "palette.png").write_bytes(png(13000, 13000, 3, 256))
    for i in range(2):
        (folder / f"color{i}.png").write_bytes(png(9900, 9900 + i, 2))
        (folder / f"palette{i}.png").write_bytes(png(9900, 9900 + i, 3, 256))
        (folder / f"medium{i}.png").write_bytes(png(6100, 6100 + i, 2))
    (folder / "claims.png").write_bytes(
        png(8, 8, 2).replace(struct.pack(">II", 8, 8), struct.pack(">II", 60000, 60000))
    )
    (folder / "stack.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 9, 3), }".ljust(117)
        + b"\n"
    )
    (folder / "objects.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (9, 9, 3), }".ljust(117) + b"\n"
    )
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    frames = [Image.new("P", (2000, 2000), i % 2) for i in range(2)] * 40
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:])
    (folder / "line\nend\x1b[31m.png").write_bytes(b"damaged")


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = path.read_text().partition(" (")
            parents.setdefault(int(rest.rpartition(") ")[2].split()[1]), []).append(int(pid))
        except (OSError, ValueError, IndexError):
            continue
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def peak(pid: int) -> float:
    """The largest resident memory that a process has had, in GB."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(match[1]) / 1e6 if match else 0.0


def measured(command: list[str], **environment: str) -> tuple[int, str, float, float]:
    """Status, output, the largest memory of any of its processes in GB, and seconds."""
    begin, most, over = time.monotonic(), [0.0], threading.Event()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )

    def watch() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], *(peak(pid) for pid in tree(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate(timeout=900)
    over.set()
    watcher.join()
    return process.returncode, output, most[0], time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, help="where to put the files; a temporary folder")
    args = parser.parse_args()
    out = pathlib.Path(tempfile.mkdtemp())
    folder = args.folder or out / "hostile"
    fill(folder)
    verb = [sys.executable, "-m", "dino_jax"]
    commands = {
        f"train {render} workers={workers}": [
            *(*verb, "train", *TINY, f"--config.data.train={folder}", f"--config.data.render={render}"),
            *(f"--config.run.workers={workers}", f"--workdir={out}/run-{render}-{workers}"),
        ]
        for render in ("host", "device")
        for workers in (0, 2)
    }
    commands["pack"] = [*verb, "pack", str(folder), f"--out={out}/packed", "--max-bad-share=0.99", "--workers=2"]
    commands["features"] = [
        *(*verb, "features", f"--checkpoint={out}/run-host-0", f"--images={folder}", f"--out={out}/f.npz"),
        *("--resize=40", "--crop=32"),
    ]
    bad = 0
    for name, command in commands.items():
        status, output, memory, seconds = measured(command, JAX_PLATFORMS="cpu")
        fine = status == 0 and "Traceback" not in output and memory < LIMIT
        bad += not fine
        print(f"{name:24} status {status}, {memory:.2f} GB, {seconds:.0f} s{'' if fine else '  FAILED'}", flush=True)
        print("   ", output.strip().splitlines()[-1][:200] if output.strip() else "", flush=True)
    listed = (out / "run-host-0" / "bad_files.txt").read_bytes().splitlines()
    print(f"{len(listed)} files in bad_files.txt, each on a line of its own")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
