"""A workdir has one run at a time: locks, signs of life, and taking over from runs that are gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from etils import epath

from dino_jax.data.arrays_source import ArraySource
from dino_jax.errors import Failure, UserError
from dino_jax.training import owner as module
from dino_jax.training.loop import train
from dino_jax.training.owner import owning
from dino_jax.weights.checkpoint import steps
from tests.gcs_stand_in import serve
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """On a file system without locks, with signs of life every 0.1 s."""
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "LOOK", 0.5)
    monkeypatch.setattr(module, "SILENCE", 1.5)

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    return epath.Path(tmp_path)


def left_by(workdir, **changes):
    """The file of a run that was killed, with other values."""
    with owning(workdir):
        record = json.loads((workdir / "owner.json").read_text())
    (workdir / "owner.json").write_text(json.dumps(record | {"id": "0"} | changes))


def test_a_second_run_is_refused_and_kill_9_frees_the_workdir_at_once(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    script = "import sys, time; from etils import epath; from dino_jax.training.owner import owning\n"
    script += "with owning(epath.Path(sys.argv[1])): print('owns', flush=True); time.sleep(100)"
    call = [sys.executable, "-c", script, str(workdir)]
    with subprocess.Popen(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "owns\n"
        who = rf"\(host .+, pid {other.pid}, since \d.+, last sign of life \d.+\)"
        how = rf"stop it first, or name another --workdir; remove {workdir}/owner.json to take over .* 180 s"
        with pytest.raises(UserError, match=rf"^--workdir={workdir}: another run is training there {who}: {how}"):
            owning(workdir).__enter__()
        other.kill()
    with owning(workdir), pytest.raises(UserError), owning(workdir):
        pass
    assert not (workdir / "owner.json").exists()


def test_without_locks_a_live_process_owns_and_one_that_is_gone_does_not(workdir, caplog):
    caplog.set_level("INFO")
    with owning(workdir):
        with pytest.raises(UserError, match=f"another run is training there .*pid {os.getpid()}"), owning(workdir):
            pass
        assert (workdir / "owner.json").exists()
    assert not caplog.records
    left_by(workdir, process="1")  # the same number, another process
    start = time.monotonic()
    with owning(workdir):
        assert time.monotonic() - start < 0.4
    assert [record.levelname for record in caplog.records] == ["INFO"] and "taking over" in caplog.text


@pytest.mark.parametrize(
    ("seen", "least"), [("2026-01-01 00:00:00+00:00", 0.5), ("2999-01-01 00:00:00+00:00", 1.5), ("no time", 1.5)]
)
def test_another_machines_run_is_gone_after_a_silence(workdir, seen, least):
    """Whatever its clock says, it gets one look."""
    left_by(workdir, machine="another", seen=seen)
    start = time.monotonic()
    with owning(workdir):
        assert least <= time.monotonic() - start < least + 1


def test_a_sign_of_life_of_another_machine_is_waited_for(workdir):
    left_by(workdir, machine="another", host="node7", seen="2026-01-01 00:00:00+00:00")
    text = (workdir / "owner.json").read_text()
    threading.Timer(0.2, (workdir / "owner.json").write_text, [text.replace('"beats": 0', '"beats": 1')]).start()
    with pytest.raises(UserError, match="host node7"), owning(workdir):
        pass


def test_signs_of_life_are_written(workdir):
    with owning(workdir):
        time.sleep(0.5)
        assert json.loads((workdir / "owner.json").read_text())["beats"] >= 2


def test_a_run_ends_that_finds_another_owner(workdir):
    with owning(workdir) as owner:
        owner.check()
        text = (workdir / "owner.json").read_text()
        (workdir / "owner.json").unlink()
        time.sleep(0.3)
        assert not (workdir / "owner.json").exists()  # stays free for the next run
        owner.check()
        (workdir / "owner.json").write_text(json.dumps(json.loads(text) | {"id": "2", "host": "node7"}))
        time.sleep(0.3)
        with pytest.raises(Failure, match=r"another run has taken over \(host node7.* ends without saving"):
            owner.check(look=False)
    assert json.loads((workdir / "owner.json").read_text())["id"] == "2"


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"host": "h", "pid": 1, "since": "x"}', "\x00" * 10])
def test_a_file_that_names_nobody_is_replaced(workdir, text):
    (workdir / "owner.json").write_text(text)
    with owning(workdir) as owner:
        owner.check()
        assert json.loads((workdir / "owner.json").read_text())["pid"] == os.getpid()


IN_A_BUCKET = """
    import time
    from etils import epath
    from dino_jax.errors import UserError
    from dino_jax.training import owner
    from dino_jax.training.owner import owning

    owner.BEAT, owner.LOOK, owner.SILENCE = 0.2, 1.0, 1.0
    workdir = epath.Path("gs://bucket/runs/1")
    with owning(workdir) as first:
        try:
            owning(workdir).__enter__()
        except UserError as error:
            print(error)
        time.sleep(0.5)
        first.check()
        text = (workdir / "owner.json").read_text()
        assert '"beats": 0' not in text, text
        owner._machine = lambda: "another"
        try:
            owning(workdir).__enter__()
        except UserError as error:
            print(error)
        (workdir / "owner.json").write_text(text.replace('"id": "', '"id": "x'))
        try:
            first.check()
        except UserError as error:
            print(error)
    assert (workdir / "owner.json").exists()
    with owning(workdir):  # after a silence
        pass
    print((workdir / "owner.json").exists())
"""


def test_a_workdir_in_a_bucket_has_one_owner(tmp_path):
    with serve() as (_, variables):
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
        call = [sys.executable, "-c", textwrap.dedent(IN_A_BUCKET)]
        child = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    refused, again, ended, left = child.stdout.splitlines()
    assert refused.startswith("--workdir=gs://bucket/runs/1: another run is training there (host ")
    assert again.startswith("--workdir=gs://bucket/runs/1: another run is training there (host ")
    assert "another run has taken over" in ended and left == "False"


@pytest.mark.extra
def test_training_ends_without_writing_once_another_run_owns_the_workdir(tmp_path):
    class Taken(ArraySource):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            path = tmp_path / "owner.json"
            if self.reads == 8 * 16:  # after the first checkpoint
                path.write_text(path.read_text().replace('"id": "', '"id": "x'))
            return super().__getitem__(index)

    config = tiny_config()
    config.epochs = 20
    with pytest.raises(Failure, match="another run has taken over"):
        train(config, tmp_path, source=Taken(np.zeros((64, 40, 36, 3), np.uint8)))
    assert max(steps(tmp_path / "checkpoints"), default=0) <= 8
    with contextlib.suppress(FileNotFoundError):
        assert json.loads((tmp_path / "owner.json").read_text())["id"].startswith("x")
