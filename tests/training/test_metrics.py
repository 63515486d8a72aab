"""What a run writes, and what is left of it after a kill, a resume and a full disk."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dino_jax.errors import UserError
from dino_jax.training.metrics import MetricWriter, Throughput, read_metrics
from tests.gcs_stand_in import serve


def lines(workdir) -> list[dict]:
    """The lines as any other reader sees them: strict JSON."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir) -> list[Event]:
    """The records of TensorBoard's files, oldest file first: length, checksum, data, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_scalars_of_every_kind(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "count": 3, "numpy": np.float32(0.25), "jax": jnp.float32(2), "note": "warm"})
        writer.write(2, {"loss": float("nan"), "up": math.inf, "down": np.float64(-math.inf)})
    first, second = lines(tmp_path)
    assert first == {"step": 1, "loss": 0.5, "count": 3, "numpy": 0.25, "jax": 2.0, "note": "warm"}
    assert second == {"step": 2, "loss": "NaN", "up": "Infinity", "down": "-Infinity"}
    _, record = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["up"] == math.inf and record["down"] == -math.inf
    shown = [(event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value]
    assert shown[:4] == [(1, "loss", 0.5), (1, "count", 3), (1, "numpy", 0.25), (1, "jax", 2)]
    assert "note" not in {tag for _, tag, _ in shown}


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in range(3):
        writer.write(step, {"loss": step})
        assert len(lines(tmp_path)) == step + 1
    assert not (tmp_path / "tensorboard").exists()


def test_images(tmp_path):
    image = np.zeros((5, 7, 3), np.uint8)
    with MetricWriter(tmp_path) as writer:
        writer.images(4, {"attention": image})
    [(event, value)] = [(event, value) for event in events(tmp_path) for value in event.summary.value]
    assert (event.step, value.tag, value.image.height, value.image.width) == (4, "attention", 5, 7)


def test_resume_cuts_back_to_the_restored_step(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(10, 60, 10):
            writer.write(step, {"loss": step / 3})
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # the kill came in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 30, 40, 50]
    with MetricWriter(tmp_path, resume_step=30) as writer:
        writer.write(40, {"loss": 0.0})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*kept, '{"step": 40, "loss": 0.0}']
    hidden_from = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert hidden_from == [31]
    with MetricWriter(tmp_path) as writer:  # a new run
        writer.write(1, {"loss": 0.0})
    assert len(lines(tmp_path)) == 1


def test_a_kill_while_cutting_loses_nothing(tmp_path, monkeypatch):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, resume_step=1, tensorboard=False)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n{"step": 3}\n')
    for use in (read_metrics, lambda workdir: MetricWriter(workdir, resume_step=3)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a JSON object with a step"):
            use(tmp_path)
    with pytest.raises(UserError, match=r"none/metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "none")


def test_damaged_files_are_one_line(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "metrics.jsonl"
    good = b"".join(b'{"step": %d, "loss": 0.5, "note": "NaN"}\n' % step for step in range(1, 6))
    odd = [
        b'{"step": 1e999}',
        b'{"step": "1"}',
        b'{"step": 1, "a": [1]}',
        b"[1]",
        b"3",
        b"\0" * 9,
        b"\xff\xfe",
        b"[" * 9999,
    ]
    files = [good[:50] + b"\n" + line + b"\n" + good for line in [*odd, b"[" * 9999, b'{"step": ' + b"9" * 5000 + b"}"]]
    for _ in range(200):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        files.append(bytes(data[: rng.integers(1, len(data) + 1)]))
    for data in files:
        for use in (read_metrics, lambda workdir: MetricWriter(workdir, resume_step=3, tensorboard=False).close()):
            path.write_bytes(data)
            said = str(path)
            try:
                use(tmp_path)
            except UserError as error:
                said = str(error)
            assert said.startswith(str(path)) and "\n" not in said
            assert said == str(path) or path.read_bytes() == data
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("lost", ["all", "first", "last"])
def test_lines_lost_before_a_resume_are_a_warning(tmp_path, caplog, lost):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(10, 60, 10):
            writer.write(step, {"loss": 0.0})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    MetricWriter(tmp_path, resume_step=55, every=10, tensorboard=False).close()
    assert not caplog.records
    path.write_text("".join({"all": [], "first": lines[3:], "last": lines[:2]}[lost]))
    MetricWriter(tmp_path, resume_step=55, every=10, tensorboard=False).close()
    missing = {"all": "1 to 55", "first": "1 to 39", "last": "21 to 55"}[lost]
    assert f"no lines of steps {missing}: " in caplog.text


def test_only_the_active_process_writes(tmp_path):
    with MetricWriter(tmp_path / "run", active=False, wandb_project="p") as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, {"x": np.zeros((2, 2, 3), np.uint8)})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir_and_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/file/run: cannot write: Not a directory; make it writable or name another folder$",
    ):
        MetricWriter(tmp_path / "file" / "run")
    writer = MetricWriter(tmp_path / "run")
    writer.write(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=rf"^{tmp_path}/run: cannot write: File too large; make room"):
            _ = [writer.write(step, {"note": "x" * 100}) for step in range(2, 1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_metrics(tmp_path / "run")) > 100  # the torn last line is skipped
    with MetricWriter(tmp_path / "run", resume_step=5) as writer:
        writer.write(6, {"loss": 2.0})
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run\.wandb=dino: wandb is not installed; `pip install wandb`"):
        MetricWriter(tmp_path, wandb_project="dino")

    calls = []

    def init(**arguments):
        calls.append(("init", arguments))
        run = types.SimpleNamespace(id=arguments["id"] or "run7")
        run.log = lambda values, step: calls.append(("log", step, values))
        run.finish = lambda: calls.append(("finish",))
        return run

    stand_in = types.SimpleNamespace(init=init, Image=lambda image: ("image", image.shape))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with MetricWriter(tmp_path, wandb_project="dino", config_json='{"seed": 3}') as writer:
        writer.write(5, {"loss": 1.5, "note": "text"})
        writer.images(5, {"x": np.zeros((2, 3, 3), np.uint8)})
    start = {"project": "dino", "config": {"seed": 3}, "id": None, "resume": None}
    logged = [("log", 5, {"loss": 1.5}), ("log", 5, {"x": ("image", (2, 3, 3))})]
    assert calls == [("init", start), *logged, ("finish",)]
    calls.clear()
    MetricWriter(tmp_path, wandb_project="dino", resume_step=5).close()  # resumes the same run
    assert calls[0][1]["id"] == "run7" and calls[0][1]["resume"] == "allow"

    def refuse(**arguments):
        raise RuntimeError("no account\nis known")

    stand_in.init = refuse
    with pytest.raises(UserError, match=r"^run\.wandb=dino: wandb does not start: no account is known; `wandb login`"):
        MetricWriter(tmp_path, wandb_project="dino")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput():
    clock = Clock()
    meter = Throughput(clock)
    for _ in range(4):
        with meter.waiting():
            clock.now += 1
        clock.now += 3
        meter.count(64)
    assert meter.read() == {"images_per_second": 16.0, "input_wait": 0.25}
    clock.now += 100  # an evaluation
    meter.reset()
    clock.now += 2
    meter.count(64)
    assert meter.read() == {"images_per_second": 32.0, "input_wait": 0.0}


IN_A_BUCKET = """
    from dino_jax.training.metrics import MetricWriter, read_metrics

    def steps():
        return [record["step"] for record in read_metrics("gs://bucket/run")]

    writer = MetricWriter("gs://bucket/run")
    writer.write(1, {"loss": float("nan")})
    writer.flush()
    writer.write(2, {"loss": 2.0})
    assert steps() == [1]
    writer._due = 0.0  # half a minute later
    writer.write(3, {"loss": 3.0})
    assert steps() == [1, 2, 3], steps()
    writer.close()
    with MetricWriter("gs://bucket/run", resume_step=2) as writer:
        writer.write(3, {"loss": 5.0})
    assert [(record["step"], record["loss"]) for record in read_metrics("gs://bucket/run")][1:] == [(2, 2.0), (3, 5.0)]
    print("passed")
"""


@pytest.mark.extra
def test_in_a_bucket():
    with serve() as (store, environment):
        environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", textwrap.dedent(IN_A_BUCKET)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert child.stdout == "passed\n", child.stderr
    boards = [key for key in store.objects if key.startswith("bucket/run/tensorboard/events")]
    assert len(boards) == 2 and all(store.objects[key][1] for key in boards)
