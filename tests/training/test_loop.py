"""The loop as a user sees it: runs, resumes to the last bit, stops on request, reports errors in one line."""

from __future__ import annotations

import gc
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax import config_io
from dino_jax.data.arrays_source import ArraySource
from dino_jax.errors import UserError
from dino_jax.training import step as train_step
from dino_jax.training.loop import train
from dino_jax.training.metrics import read_metrics
from dino_jax.weights.checkpoint import abstract, resolve, restore, steps
from tests.gcs_stand_in import serve
from tests.tiny import tiny_config

TIMING = ("images_per_second", "input_wait")  # may differ between equal runs


@pytest.fixture(scope="module")
def images():
    """64 labeled noise images of two classes."""
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (64, 40, 36, 3), np.uint8), np.arange(64) % 2)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return train(tiny_config(), workdir, source=images), workdir


def untimed(workdir):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(workdir)]


def assert_same_run(state, workdir, uninterrupted):
    jax.tree.map(np.testing.assert_array_equal, state, uninterrupted[0])
    assert untimed(workdir) == untimed(uninterrupted[1])


def test_a_run_leaves_what_it_should(uninterrupted):
    state, workdir = uninterrupted
    assert int(state.step) == 12
    assert steps(workdir / "checkpoints") == [8, 12]
    assert config_io.from_json((workdir / "config.json").read_text()) == tiny_config()
    records = read_metrics(workdir)
    assert [record["step"] for record in records] == list(range(1, 13))
    named = {"loss", "teacher_entropy", "kl", "ln_k_gap", "center_norm", "grad_norm", "lr", "weight_decay", "momentum"}
    assert named | {"teacher_temp", "epoch", *TIMING} <= records[0].keys()
    assert all(np.isfinite(record["loss"]) for record in records)
    assert resolve(workdir)[1] == 12


def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, images, tmp_path):
    for stop_after in (3, 4, 0):  # in the middle of an epoch, then of another
        config = tiny_config()
        config.run.stop_after = stop_after
        state = train(config, tmp_path, source=images)
    assert_same_run(state, tmp_path, uninterrupted)


def test_resuming_on_other_devices_is_the_same_run(uninterrupted, images, tmp_path):
    """8 devices after 1: same data position, crops and drop-path factors; sums round differently."""
    config = tiny_config()
    config.run.stop_after, config.run.mesh.data = 6, 1
    train(config, tmp_path, source=images)
    config.run.stop_after, config.run.mesh.data = 0, 8
    train(config, tmp_path, source=images)
    losses = [record["loss"] for record in read_metrics(tmp_path)]
    np.testing.assert_allclose(losses, [r["loss"] for r in read_metrics(uninterrupted[1])], rtol=2e-3)


def test_damaged_newest_checkpoint_falls_back(uninterrupted, images, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[1], workdir)
    damage(workdir / "checkpoints" / "12")
    assert_same_run(train(tiny_config(), workdir, source=images), workdir, uninterrupted)


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_afresh(uninterrupted, images, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[1], workdir)
    damage(workdir / "checkpoints")
    expected = (
        rf"^{workdir}/checkpoints: none of the checkpoints there can be used \(8, 12\): restore .* another --workdir"
    )
    with pytest.raises(UserError, match=expected):
        train(tiny_config(), workdir, source=images)
    assert untimed(workdir) == untimed(uninterrupted[1])
    assert steps(workdir / "checkpoints") == [8, 12]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.extra)])
def test_a_full_disk_is_one_line_and_loses_nothing(uninterrupted, images, tmp_path, asynchronous, capfd, caplog):
    config = tiny_config()
    config.run.async_checkpoint, config.run.stop_after = asynchronous, 4
    train(config, tmp_path, source=images)
    config.run.stop_after = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # room for the metrics, not for a checkpoint
    try:
        with pytest.raises(UserError) as caught:
            train(config, tmp_path, source=images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fix = "make room there, then the same command goes on from what was saved"
    assert str(caught.value) == f"{tmp_path}/checkpoints: cannot write a checkpoint: File too large; {fix}"
    del caught
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert resolve(tmp_path)[1] == 4
    assert_same_run(train(config, tmp_path, source=images), tmp_path, uninterrupted)


def test_a_trace_of_some_steps(uninterrupted, images, tmp_path):
    config = tiny_config()
    config.run.stop_after, config.run.profile_steps = 4, (1, 3)
    train(config, tmp_path, source=images)
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert not (uninterrupted[1] / "profile").exists()  # off by default


def test_several_non_finite_steps_rewind_then_stop_with_a_reason(images, tmp_path, monkeypatch, capsys):
    config = tiny_config()
    config.run.progress, config.run.max_bad_steps, config.run.max_rewinds = True, 2, 1
    real, salts = train_step.train_step, []

    def poisoned(recipe, state, inputs):
        salts.append(state.salt)
        crops = [c * jax.numpy.where(state.step >= 5, np.nan, 1.0) for c in inputs.crops]
        return real(recipe, state, inputs._replace(crops=crops))

    monkeypatch.setattr(train_step, "train_step", poisoned)
    with pytest.raises(UserError, match=r"2 non-finite steps in a row, after 1 rewind"):
        train(config, tmp_path, source=images)
    said = capsys.readouterr().err
    assert "went back to step 4" in said
    assert steps(tmp_path / "checkpoints") == [4]  # the last good one stays
    assert [record["step"] for record in read_metrics(tmp_path)][:5] == [1, 2, 3, 4, 5]


def command(config_file, workdir, *overrides):
    return [sys.executable, "-m", "dino_jax", "train", f"--config={config_file}", f"--workdir={workdir}", *overrides]


def environment():
    return os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


@pytest.fixture
def config_file(tmp_path):
    """A configuration on a folder of images, as a file for the command line."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    path = tmp_path / "config.py"
    path.write_text(
        "from tests.tiny import tiny_config\n"
        "def get_config():\n"
        "    config = tiny_config()\n"
        f"    config.data.train = {str(tmp_path / 'images')!r}\n"
        "    config.epochs = 30\n"
        "    config.run.keep = 100\n"
        "    config.run.checkpoint_every = 0.25\n"
        "    config.run.async_checkpoint = True\n"
        "    return config\n"
    )
    return path


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


def test_sigterm_saves_and_exits_cleanly(config_file, tmp_path):
    workdir = tmp_path / "run"
    call = command(config_file, workdir, "--config.run.progress=true")
    process = subprocess.Popen(call, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps(workdir / "checkpoints"), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert "stopped by SIGTERM at step" in said
    last = steps(workdir / "checkpoints")[-1]
    assert [record["step"] for record in read_metrics(workdir)] == list(range(1, last + 1))


@pytest.mark.extra
def test_kill_9_at_any_moment_loses_nothing(config_file, tmp_path):
    """Killed at random moments, some mid-save, then run to the end: the same bits as uninterrupted."""
    overrides = ("--config.epochs=6",)

    def finish(workdir):
        subprocess.run(command(config_file, workdir, *overrides), env=environment(), check=True, capture_output=True)
        folder = workdir / "checkpoints"
        saved = restore(folder, 24, {item: abstract(folder, 24, item) for item in ("student", "teacher", "rest")})
        return untimed(workdir), saved

    killed = tmp_path / "killed"
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(config_file, killed, *overrides), env=environment(), stderr=subprocess.PIPE, text=True
        )
        seen = len(steps(killed / "checkpoints"))
        wait_for(lambda seen=seen: len(steps(killed / "checkpoints")) > seen, process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
    (metrics, state), (expected_metrics, expected_state) = finish(killed), finish(tmp_path / "straight")
    assert metrics == expected_metrics
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


IN_A_BUCKET = """
    import sys
    import jax
    import numpy as np
    from dino_jax.errors import UserError
    from dino_jax.training.metrics import read_metrics
    from dino_jax.training.loop import train
    from tests.tiny import tiny_config

    config, local, bucket = tiny_config(), sys.argv[1], "gs://bucket/runs/1"
    config.epochs = 2
    config.run.tensorboard = config.run.async_checkpoint = True
    straight = train(config, local)
    for run in ({"stop_after": 6, "profile_steps": (1, 2)}, {"stop_after": 0}):  # 4 and 6 are saved
        config.run.update(run)
        resumed = train(config, bucket)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    losses, expected = ([(r["step"], r["loss"]) for r in read_metrics(workdir)] for workdir in (bucket, local))
    assert losses == expected and len(losses) == 8, losses
    config.optim.lr = 0.1
    try:
        train(config, bucket)
    except UserError as error:
        print(error)
"""


@pytest.mark.extra
def test_a_workdir_in_a_bucket(tmp_path):
    with serve() as (store, variables):
        call = [sys.executable, "-c", textwrap.dedent(IN_A_BUCKET), str(tmp_path)]
        child = subprocess.run(call, env=environment() | variables, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("gs://bucket/runs/1/config.json: this workdir belongs to a run of another")
    names = {name.removeprefix("bucket/runs/1/") for name in store.objects}
    assert {"config.json", "metrics.jsonl", "checkpoints/8/teacher/_METADATA"} <= names
    for part in ("tensorboard/events", "profile/plugins/profile/"):
        assert any(name.startswith(part) for name in names), names


def run_command(*arguments):
    process = subprocess.run(
        [sys.executable, "-m", "dino_jax", *arguments], env=environment(), capture_output=True, text=True
    )
    return process.returncode, process.stderr.strip().splitlines()


@pytest.fixture
def bad_input(tmp_path):
    """`bad_input(overrides, workdir)`: the one line of a run that cannot start."""

    def call(overrides=(), workdir=None, **changes):
        config = config_io.override(tiny_config(), [f"--config.{o}" for o in overrides])
        with pytest.raises(UserError) as caught:
            train(config, workdir or tmp_path / "run")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


def test_bad_data_gets_one_clear_line(bad_input, tmp_path):
    empty, text, broken = (tmp_path / name for name in ("empty", "text", "broken"))
    for folder in (empty, text, broken):
        folder.mkdir()
    (text / "notes.txt").write_text("no image")
    for i in range(20):
        (broken / f"{i}.jpg").write_bytes(b"\xff\xd8 not an image")
    for folder in (empty, text, broken, tmp_path / "absent"):
        assert str(folder) in bad_input([f"data.train={folder}"])
    assert "none of the 20 images" in bad_input([f"data.train={broken}"])


def test_settings_that_do_not_fit_get_one_clear_line(bad_input):
    assert "patches of 7" in bad_input(["model.patch_size=7"])
    assert "batch_size=12" in bad_input(["batch_size=12", "run.mesh.data=8"])
    assert "run.accum_steps=3" in bad_input(["run.accum_steps=3"])
    assert "8 device(s)" in bad_input(["run.mesh.data=16"])
    assert "vit_tiny" in bad_input(["model.name=vit_tinny"])
    assert "batch_size" in bad_input(["batch_size=128"])


def test_workdirs_that_cannot_serve_get_one_clear_line(bad_input, uninterrupted, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in bad_input(workdir=file)
    other = bad_input(["optim.lr=0.1"], workdir=uninterrupted[1])
    assert "another configuration" in other
    assert "optim.lr: 0.0005 -> 0.1" in other
    lost = shutil.copytree(uninterrupted[1], tmp_path / "lost")
    (lost / "config.json").unlink()  # the checkpoints have it too
    assert bad_input(["optim.lr=0.1"], workdir=lost) == other.replace(str(uninterrupted[1]), str(lost))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "checkpoints").touch()
    assert bad_input(workdir=blocked).startswith(f"{blocked}/checkpoints: cannot be written: ")
    garbled = tmp_path / "garbled"
    garbled.mkdir()
    (garbled / "config.json").write_text('{"seed":')
    assert str(garbled / "config.json") in bad_input(workdir=garbled)


def test_command_line_prints_one_line_and_status_2(tmp_path):
    status, lines = run_command("train", f"--config={tmp_path / 'absent.py'}", f"--workdir={tmp_path}")
    assert status == 2
    (line,) = lines
    assert line.startswith(f"dino-jax: error: --config={tmp_path / 'absent.py'}: there is no such file or name")
