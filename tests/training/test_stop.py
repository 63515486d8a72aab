"""Runs that are told to stop while their input stalls, and whose workers or parents are killed."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from dino_jax.training.metrics import read_metrics
from dino_jax.training.stop import Interrupted, StopSignal
from dino_jax.weights.checkpoint import steps

ROOT = pathlib.Path(__file__).parents[2]
RUN = """
    import logging, os, sys, time
    import numpy as np
    from dino_jax.cli import main
    from dino_jax.data.arrays_source import ArraySource
    from dino_jax.training import loop
    from tests.tiny import tiny_config

    ARGUMENTS = sys.argv[1:]

    class Stalling(ArraySource):
        def __init__(self, images, stall):
            super().__init__(images)
            self.stall = stall

        def __getitem__(self, index):
            while os.path.exists(self.stall):
                time.sleep(0.1)
            return super().__getitem__(index)

    def run(args, overrides):
        workdir, workers, stall, limit = ARGUMENTS
        config = tiny_config()
        config.run.workers, config.run.stall_timeout, config.epochs = int(workers), float(limit), 1000
        config.run.checkpoint_every = 1000.0
        loop.train(config, workdir, source=Stalling(np.zeros((64, 40, 36, 3), np.uint8), stall))

    if __name__ == "__main__":
        from dino_jax.training import train_verb
        train_verb.VERB = train_verb.VERB._replace(run=run)
        sys.argv[1:] = ["train", "--config=x", "--workdir=x"]
        sys.exit(main())
"""


class Run:
    """A run of tiny images in a process group of its own, whose source can be made to stall."""

    def __init__(self, folder: pathlib.Path, workers: int, limit: float = 0):
        (folder / "run.py").write_text(textwrap.dedent(RUN))
        self.workdir, self.stall = folder / "run", folder / "stall"
        call = [sys.executable, str(folder / "run.py"), *map(str, (self.workdir, workers, self.stall, limit))]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")}
        environment = os.environ | cache | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            call, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not (self.workdir / "metrics.jsonl").exists() or len(read_metrics(self.workdir)) < 3:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self, seconds: float) -> list[str]:
        """What it says until its end."""
        try:
            return self.process.communicate(timeout=seconds)[1].splitlines()
        finally:
            self.process.kill()

    def children(self) -> list[int]:
        """The worker processes."""
        found = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and "spawn_main" in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def assert_saved(self) -> None:
        """Everything that was trained is in the checkpoint and in the metrics."""
        (last,) = steps(self.workdir / "checkpoints")
        assert [record["step"] for record in read_metrics(self.workdir)] == list(range(1, last + 1))


@pytest.mark.extra
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_the_run_although_the_input_stalls(tmp_path, workers, number):
    run = Run(tmp_path, workers)
    run.stall.touch()
    time.sleep(1.5)
    os.killpg(run.process.pid, number)
    said = run.end(15)
    assert run.process.returncode == 0, said
    assert f"stopped by {number.name} at step" in said[-1] and not any("Traceback" in line for line in said)
    run.assert_saved()


@pytest.mark.extra
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_reaches_only_the_run_itself(tmp_path, number):
    run = Run(tmp_path, 2)
    os.killpg(run.process.pid, number)
    said = run.end(15)
    assert run.process.returncode == 0 and len(said) == 2 and f"stopped by {number.name}" in said[-1], said
    run.assert_saved()


@pytest.mark.extra
def test_a_worker_that_dies_just_before_a_signal_is_part_of_the_stop(tmp_path):
    run = Run(tmp_path, 2)
    os.kill(run.children()[0], signal.SIGKILL)
    time.sleep(0.2)
    run.process.terminate()
    said = run.end(15)
    assert run.process.returncode == 0 and len(said) == 2 and "stopped by SIGTERM" in said[-1], said
    run.assert_saved()


@pytest.mark.extra
def test_after_the_stall_timeout_one_process_saves_and_says_what_it_waited_for(tmp_path):
    run = Run(tmp_path, 0, limit=3)
    run.stall.touch()
    said = run.end(20)
    assert run.process.returncode == 1
    assert said[-1].startswith("dino-jax: error: waited 3 s for the input of step ") and "saved at step" in said[-1]
    run.assert_saved()


@pytest.mark.extra
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_once(tmp_path):
    run = Run(tmp_path, 0)
    (run.workdir / "checkpoints").rmdir()
    (run.workdir / "checkpoints").touch()
    run.process.terminate()
    said = run.end(15)
    assert run.process.returncode == 2
    assert said[-1].startswith(f"dino-jax: error: {run.workdir}/checkpoints: cannot write a checkpoint:"), said


@pytest.mark.extra
def test_a_killed_worker_is_one_line_after_a_checkpoint(tmp_path):
    run = Run(tmp_path, 2)
    os.kill(run.children()[0], signal.SIGKILL)
    said = run.end(60)
    assert run.process.returncode == 1
    killed = "dino-jax: error: run.workers: a worker process was killed by SIGKILL (out of memory?): lower run.workers"
    assert said[-1].startswith(killed) and "saved at step" in said[-1] and len(said) == 2, said
    run.assert_saved()


@pytest.mark.extra
def test_workers_end_with_a_killed_run_also_while_they_stall(tmp_path):
    run = Run(tmp_path, 2)
    run.stall.touch()
    workers = run.children()
    assert len(workers) == 2
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_signals_interrupt_waits_but_not_saving():
    with StopSignal() as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
        with pytest.raises(Interrupted), stop.interrupting():
            time.sleep(10)
        assert stop.number == signal.SIGHUP
        with pytest.raises(Interrupted), stop.interrupting():
            raise AssertionError("not reached")
        with stop.protecting():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.number
    signal.signal(signal.SIGHUP, before)
