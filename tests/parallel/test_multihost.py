"""Real processes on this machine (Gloo between CPU devices) give the same run, whatever happens to them."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import dino_jax.training.prefetch
from dino_jax.config_io import load
from dino_jax.training.loop import train
from dino_jax.training.metrics import read_metrics
from dino_jax.weights.checkpoint import steps

pytestmark = pytest.mark.extra
ROOT = pathlib.Path(__file__).parents[2]

# 20 steps, 5 epochs of all 64 images. The file is Python, so it also notes the images of each batch, and makes
# process 1 differ in what $ODD says.
CONFIG = """
import json, os
import numpy as np
import jax
import dino_jax.parallel.sharding, dino_jax.training.loop, dino_jax.training.prefetch
from dino_jax.data.arrays_source import ArraySource
from tests.tiny import tiny_config

def get_config():
    config = tiny_config()
    config.epochs = 5
    config.data.train = {images!r}
    config.run.checkpoint_every = 0.25
    config.run.keep = 100
    odd = os.environ.get("ODD")
    if odd == "mesh":
        config.run.checkpoint_every = 5.0  # of which four processes make much work
        make_mesh = dino_jax.parallel.sharding.make_mesh
        apart = lambda: sorted(jax.devices(), key=lambda device: (device.id % 2, -device.id))
        dino_jax.parallel.sharding.make_mesh = lambda sizes: make_mesh(sizes, apart())
    odd = odd if os.environ.get("JAX_PROCESS_ID") == "1" else None
    if odd == "config":
        config.optim.lr = 0.25
    if odd == "data":
        dino_jax.training.loop.open_source = lambda spec: ArraySource(np.zeros((64, 40, 36, 3), np.uint8))
    if odd == "absent":
        config.data.train = {images!r} + ".absent"
    return config

def noted(make_dataset):
    def make(source, config, *, position, salt, batch_slice):
        name = os.environ["NOTES"] + f"/{{position // config.batch_size}}-{{os.getpid()}}.jsonl"
        with open(name, "w") as notes:
            for batch in make_dataset(source, config, position=position, salt=salt, batch_slice=batch_slice):
                print(json.dumps(batch["index"].tolist()), file=notes, flush=True)
                yield batch
    return make

if not hasattr(dino_jax.training.prefetch, "unnoted"):
    dino_jax.training.prefetch.unnoted = dino_jax.training.prefetch.make_dataset
    dino_jax.training.prefetch.make_dataset = noted(dino_jax.training.prefetch.make_dataset)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multihost")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (64, 40, 36, 3), np.uint8))
    (folder / "config.py").write_text(CONFIG.format(images=str(folder / "images.npz")))
    yield folder / "config.py"
    if hasattr(dino_jax.training.prefetch, "unnoted"):
        dino_jax.training.prefetch.make_dataset = dino_jax.training.prefetch.unnoted
        del dino_jax.training.prefetch.unnoted


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """Losses of the run in one process on one device."""
    folder = tmp_path_factory.mktemp("alone")
    resume_here(config_file, folder, devices=1)
    return losses(folder)


def resume_here(config_file, workdir, devices, stop_after=0):
    """Resumes in this process, on a number of fake devices."""
    (workdir / "notes").mkdir(exist_ok=True)
    os.environ["NOTES"] = str(workdir / "notes")
    config = load(str(config_file))
    config.run.mesh.data, config.run.stop_after = devices, stop_after
    train(config, workdir)


def losses(workdir):
    records = read_metrics(workdir)
    assert [record["step"] for record in records] == list(range(1, 21))
    return [record["loss"] for record in records]


class Run:
    """A launch of so many processes in `workdir`."""

    def __init__(self, number, config_file, workdir, odd="", **variables):
        (workdir / "notes").mkdir(parents=True, exist_ok=True)
        fixed = {"NOTES": str(workdir / "notes"), "ODD": odd, "PYTHONPATH": str(ROOT)}
        variables = {"XLA_FLAGS": ""} | variables | fixed
        command = [sys.executable, str(ROOT / "launch" / "supervise.py"), "--local", str(number), "--"]
        command += [sys.executable, "-m", "dino_jax", "train", f"--config={config_file}", f"--workdir={workdir}"]
        self.workdir, self.lines = workdir, []
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while len(self.pids()) < number:
            self.lines.append(self.process.stdout.readline())

    def pids(self):
        found = [line.split() for line in self.lines if line.startswith("multihost: process")]
        return {int(words[2]): int(words[4]) for words in found}

    def after_a_step(self):
        """Waits for a new checkpoint."""
        folder = self.workdir / "checkpoints"
        before, deadline = steps(folder), time.monotonic() + 400
        while steps(folder) == before:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.02)
        return self

    def end(self):
        """Waits for it; status and lines."""
        said, _ = self.process.communicate(timeout=500)
        self.lines += said.splitlines()
        return self.process.returncode, self.lines


def images_by_step(workdir):
    """What was consumed in each step by what led to the end: of every session up to where the next one began."""
    sessions = {}
    for path in (workdir / "notes").iterdir():
        sessions.setdefault(int(path.name.split("-")[0]), []).append(path.read_text().splitlines())
    starts = sorted(sessions)
    consumed = {}
    for start, end in zip(starts, [*starts[1:], 20], strict=True):
        for step in range(start, end):
            consumed[step] = [image for rows in sessions[start] for image in json.loads(rows[step - start])]
    return consumed


def assert_every_image_once(workdir):
    consumed = images_by_step(workdir)
    for epoch in range(5):
        seen = [image for step in range(4 * epoch, 4 * epoch + 4) for image in consumed[step]]
        assert sorted(seen) == list(range(64))


def test_four_processes_equal_one(alone, config_file, tmp_path):
    """Two devices each, not adjacent in the mesh, as on a TPU pod: nor are a process's rows in the batch."""
    two_devices = "--xla_force_host_platform_device_count=2"
    status, lines = Run(4, config_file, tmp_path, odd="mesh", XLA_FLAGS=two_devices).end()
    assert status == 0, "\n".join(lines)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-4)
    assert_every_image_once(tmp_path)
    assert not [line for line in lines if "INFO" in line and not line.startswith("[0]")]


def test_dead_and_stuck_processes_end_the_launch_and_it_resumes(alone, config_file, tmp_path):
    run = Run(2, config_file, tmp_path).after_a_step()
    os.kill(run.pids()[1], signal.SIGKILL)
    start = time.monotonic()
    status, lines = run.end()
    assert time.monotonic() - start < 120
    assert status == 137
    assert "multihost: process 1 on" in lines[-1] and "SIGKILL" in lines[-1]

    run = Run(2, config_file, tmp_path, DINO_HEARTBEAT_TIMEOUT="10").after_a_step()
    os.kill(run.pids()[1], signal.SIGSTOP)
    start = time.monotonic()
    status, lines = run.end()
    assert time.monotonic() - start < 120
    assert status != 0
    assert "multihost: process 1 on" in lines[-1] and "does not answer" in lines[-1]

    status, lines = Run(2, config_file, tmp_path).end()
    assert status == 0, "\n".join(lines)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-4)
    assert_every_image_once(tmp_path)


def test_sigterm_stops_all_at_one_step_and_the_run_goes_on_elsewhere(alone, config_file, tmp_path):
    run = Run(2, config_file, tmp_path).after_a_step()
    run.process.send_signal(signal.SIGTERM)
    status, lines = run.end()
    assert status == 0, "\n".join(lines)
    last = steps(tmp_path / "checkpoints")[-1]
    said = f"stopped by SIGTERM \\(process [01]\\) at step {last} of 20"  # the one whose signal came a step earlier
    assert any(re.search(said, line) for line in lines), "\n".join(lines)
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    resume_here(config_file, copy, devices=1, stop_after=2)
    resume_here(config_file, copy, devices=8)
    np.testing.assert_allclose(losses(copy), alone, rtol=1e-4)
    assert_every_image_once(copy)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("config", "differs from process 0 (HOST) in config.optim.lr: 0.25 against 0.0005"),
        ("data", "differs from process 0 (HOST) in contents of data.train: "),
        ("absent", "images.npz.absent: no such file"),
    ],
)
def test_what_differs_at_the_start_is_one_line(odd, words, config_file, tmp_path):
    status, lines = Run(2, config_file, tmp_path, odd=odd).end()
    assert status == 2
    host = os.uname().nodename
    (line,) = [line for line in lines if line.startswith("[0] dino-jax: error: ")]
    assert line.startswith(f"[0] dino-jax: error: process 1 ({host})")
    assert words.replace("HOST", host) in line
    assert "multihost: process 1 on" in lines[-1]
    assert not (tmp_path / "config.json").exists()
    assert not any("Traceback" in line for line in lines)
