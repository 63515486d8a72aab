"""Worker processes end with their parent, whatever ended it, and leave nothing behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dino_jax.data import workers
from dino_jax.data.pipeline import make_dataset
from dino_jax.data.sources import open_source
from tests.tiny import tiny_config

READ = """
import contextlib, multiprocessing, multiprocessing.shared_memory, signal, sys, time
from dino_jax.data.pipeline import make_dataset
from dino_jax.data.sources import open_source
from tests.tiny import tiny_config

name = "/" + sys.argv[-1]  # what it leaves in /dev/shm can be told from others'
multiprocessing.shared_memory._SHM_NAME_PREFIX = multiprocessing.current_process()._config["semprefix"] = name

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of shells ignore it
    config = tiny_config()
    config.run.workers = 2
    with contextlib.closing(make_dataset(open_source(config.data.train), config)) as batches:
        for number, batch in enumerate(batches):
            print(number, flush=True)
            time.sleep(0.01)
"""
LINUX = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks at /proc and /dev/shm")
ROOT = str(pathlib.Path(__file__).parents[2])


@pytest.fixture
def reading(tmp_path):
    """A process that reads batches with two workers, past its first one, and its names in /dev/shm."""
    (tmp_path / "read.py").write_text(READ)
    name = f"t{os.getpid() % 10**5}_"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "read.py"), name],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n", process.communicate()[1].decode()
    assert named(name)
    yield process, name
    process.kill()
    process.communicate()


def named(name: str) -> list[str]:
    return [found for found in os.listdir("/dev/shm") if name in found]


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in text.split()]


def gone(pids: list[int], name: str) -> bool:
    """Whether the processes and the names end within some seconds."""
    for _ in range(100):
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and not named(name):
            return True
        time.sleep(0.1)
    return False


@LINUX
def test_nothing_is_left_after_kill_9(reading):
    process, name = reading
    pids = children(process.pid)
    assert len(pids) == 3  # and multiprocessing's tracker
    process.send_signal(signal.SIGKILL)
    assert gone(pids, name)
    assert b"Traceback" not in process.communicate()[1]


@LINUX
def test_ctrl_c_is_the_parents(reading):
    """In a terminal it reaches the whole group: workers print nothing and end with their parent."""
    process, name = reading
    pids = children(process.pid)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
    for _ in range(5):
        process.stdout.readline()
    assert set(children(process.pid)) == set(pids)
    process.send_signal(signal.SIGINT)
    assert gone(pids, name)
    assert b"Process grain" not in process.communicate()[1]  # how multiprocessing heads a worker's traceback


def test_a_killed_worker_is_one_line():
    config = tiny_config()
    config.run.workers = 1
    batches = make_dataset(open_source(config.data.train), config)
    next(batches)
    [worker] = [child for child in multiprocessing.active_children() if child.name.startswith("grain-")]
    worker.kill()
    message = r"run\.workers: a worker process was killed by SIGKILL.*lower run\.workers"
    with pytest.raises(workers.WorkerDied, match=message) as caught:
        list(itertools.islice(batches, 1000))
    assert "\n" not in str(caught.value)
    batches.close()
