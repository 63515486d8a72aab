"""Kills a run with worker processes (-9) at random moments and checks that nothing is lost or left behind.

    python -m tests.training.kill_drill --kills=50

Half of the kills come within 0.2 s after the beginning or the end of a checkpoint's write. The same command resumes
each time, and in the end the checkpoint and the metrics must be those of an uninterrupted run. Prints a line for each
kill and the outcome; exit status 0 only if all is well.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import textwrap
import time

import jax
import numpy as np

from dino_jax.training.metrics import read_metrics
from dino_jax.weights.checkpoint import abstract, restore, steps

ROOT = pathlib.Path(__file__).parents[2]
RUN = """
    import multiprocessing, multiprocessing.shared_memory, os, sys

    name = "/" + os.environ["DRILL"]  # what it leaves in /dev/shm can be told from others'
    multiprocessing.shared_memory._SHM_NAME_PREFIX = multiprocessing.current_process()._config["semprefix"] = name
    if __name__ == "__main__":
        from dino_jax.cli import main
        sys.exit(main())
"""
CONFIG = """
    from tests.tiny import tiny_config

    def get_config():
        config = tiny_config()
        config.epochs = {epochs}
        config.run.update({{"workers": 2, "threads": 1, "checkpoint_every": 4.0, "async_checkpoint": True}})
        return config
"""
WARM = 1.0  # a random kill comes at most so many seconds after the first step


class Drill:
    """Runs of one configuration in `folder`."""

    def __init__(self, folder: pathlib.Path, kills: int, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.name = f"k{os.getpid() % 10**5}_"
        self.steps = 16 * (kills + 4)
        (folder / "run.py").write_text(textwrap.dedent(RUN))
        (folder / "config.py").write_text(textwrap.dedent(CONFIG).format(epochs=self.steps // 4))
        self.problems: list[str] = []
        self.beginning = 0.0  # seconds that a start took

    def start(self, workdir: pathlib.Path) -> subprocess.Popen[bytes]:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        place = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "DRILL": self.name}
        call = [str(self.folder / "run.py"), "train", f"--config={self.folder}/config.py", f"--workdir={workdir}"]
        with open(self.folder / "said", "wb") as said:
            return subprocess.Popen([sys.executable, *call], env=os.environ | cache | place, stderr=said)

    def finish(self, workdir: pathlib.Path) -> None:
        """Runs to the end."""
        start = time.monotonic()
        process = self.start(workdir)
        while process.poll() is None:
            if not self.beginning and written(workdir):
                self.beginning = time.monotonic() - start
            time.sleep(0.01)
        if process.returncode:
            self.problems.append(f"ended with status {process.returncode}: {(self.folder / 'said').read_text()}")

    def kill(self, workdir: pathlib.Path, at_checkpoint: bool) -> bool:
        """Starts the run and kills it; False if it ended before."""
        before, lines, start = written(workdir), metrics_size(workdir), time.monotonic()
        process = self.start(workdir)
        moment = self.random.uniform(0, self.beginning)
        complete = self.random.random() < 0.5  # whether to wait for a complete checkpoint, or for its first file
        while process.poll() is None:
            now = written(workdir)
            new, before = now - before, before & now  # Orbax first removes what is half-written
            if any(name.isdigit() or not complete for name in new) and at_checkpoint:
                break
            if not at_checkpoint:
                if metrics_size(workdir) > lines:
                    moment = min(moment, time.monotonic() - start + self.random.uniform(0, WARM))
                    lines = sys.maxsize
                if time.monotonic() - start > moment:
                    break
            time.sleep(0.005)
        if at_checkpoint:
            time.sleep(self.random.uniform(0, 0.2))
        ended = process.poll() is not None
        process.kill()
        process.wait()
        said = (self.folder / "said").read_text()
        if "Traceback" in said or ended:
            self.problems += [said] * ("Traceback" in said or bool(process.returncode))
        self.check_nothing_left()
        return not ended

    def check_nothing_left(self) -> None:
        for _ in range(100):
            left = [*processes(self.name), *(name for name in os.listdir("/dev/shm") if self.name in name)]
            if not left:
                return
            time.sleep(0.1)
        self.problems.append(f"left behind: {left}")

    def compare(self, killed: pathlib.Path, straight: pathlib.Path) -> None:
        first, second = (untimed(workdir) for workdir in (killed, straight))
        if [record["step"] for record in first] != list(range(1, self.steps + 1)):
            self.problems.append("metrics.jsonl has lost or doubled lines")
        if first != second:
            self.problems.append("metrics.jsonl differs")
        items = ("student", "teacher", "rest")
        folders = [workdir / "checkpoints" for workdir in (killed, straight)]
        if any(steps(folder)[-1:] != [self.steps] for folder in folders):
            self.problems.append("the last checkpoint is missing")
            return
        wanted = {item: abstract(folders[0], self.steps, item) for item in items}
        states = [restore(folder, self.steps, wanted) for folder in folders]
        equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), *states)
        if not all(jax.tree.leaves(equal)):
            self.problems.append("the last checkpoint differs")


def written(workdir: pathlib.Path) -> set[str]:
    """The names in the checkpoints folder, half-written ones too."""
    try:
        return {name for name in os.listdir(workdir / "checkpoints") if name[0].isdigit()}
    except FileNotFoundError:
        return set()


def metrics_size(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def untimed(workdir: pathlib.Path) -> list[dict]:
    timing = ("images_per_second", "input_wait")
    return [{key: value for key, value in record.items() if key not in timing} for record in read_metrics(workdir)]


def processes(name: str) -> list[str]:
    """The processes with this DRILL in their environment."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"DRILL={name}".encode() in (folder / "environ").read_bytes():
                found.append(f"process {folder.name}")
        except OSError:
            continue
    return found


def drill(folder: pathlib.Path, kills: int, minutes: float = 60, seed: int = 0) -> list[str]:
    """The problems found; prints its progress. Stops killing after some minutes."""
    this, start = Drill(folder, kills, seed), time.monotonic()
    straight, killed = folder / "straight", folder / "killed"
    this.finish(straight)
    print(f"uninterrupted: {this.steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    done = {True: 0, False: 0}
    while sum(done.values()) < kills and time.monotonic() - start < 60 * minutes:
        at_checkpoint = done[True] <= done[False]
        partial = len([name for name in written(killed) if not name.isdigit()])
        if not this.kill(killed, at_checkpoint):
            break
        done[at_checkpoint] += 1
        there = written(killed)
        half = " during a write" if len([name for name in there if not name.isdigit()]) > partial else ""
        last = max(steps(killed / "checkpoints"), default=0) if there else 0
        moment = "at a checkpoint" if at_checkpoint else "at random"
        print(f"kill {sum(done.values())}, {moment}{half}: last checkpoint {last}", flush=True)
    this.finish(killed)
    this.check_nothing_left()
    this.compare(killed, straight)
    result = "; ".join(this.problems) or "bit-equal, no metric line lost or doubled, no process or file left"
    print(f"{done[True]} kills at a checkpoint, {done[False]} at random: {result}", flush=True)
    return this.problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kills and resumes a run.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60, help="stop killing after this time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(bool(drill(pathlib.Path(temporary), arguments.kills, arguments.minutes, arguments.seed)))
