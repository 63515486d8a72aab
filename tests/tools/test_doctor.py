"""`dino-jax doctor`: what is missing is named with its fix, and nothing that is there is."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dino_jax import config_io
from dino_jax.cli import main
from dino_jax.config import default
from dino_jax.data import sources
from dino_jax.errors import UserError
from dino_jax.tools import doctor, machine

CONFIG = """\
from dino_jax.config import default

def get_config():
    config = default()
    config.batch_size = 16
    config.data.train = "scenes:train?size=32&image_size=16"
    return config
"""
EIGHT = {"count": 8, "kind": "TPU v5e", "platform": "tpu", "jax": "1", "wrong": "", "seconds": 0.1}


@pytest.fixture
def answer(monkeypatch):
    """What the devices are said to answer; a test may change it."""
    answer = dict(EIGHT)
    monkeypatch.setattr(machine, "_ask", lambda config: (answer, ""))
    monkeypatch.setattr(machine, "hardware", lambda: None)
    return answer


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def checks(**arguments) -> dict[str, machine.Check]:
    return {check.name: check for check in doctor.doctor(**arguments)}


def load(config: str, *overrides: str):
    return config_io.load(config, overrides)


def folder_of_images(folder: pathlib.Path, count: int) -> pathlib.Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


# --- as a whole


def test_a_machine_that_lacks_nothing(answer, config, tmp_path, capsys):
    assert main(["doctor", f"--config={config}", f"--workdir={tmp_path / 'runs' / 'new'}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["ok"] is True
    assert set(found["checks"]) == {
        *("config", "python", "packages", "devices", "batch", "memory", "disk", "files", "workdir", "data")
    }
    assert not any(line.startswith("missing") for line in lines)
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_what_is_missing_gives_status_2_one_line_and_json(answer, tmp_path, capsys):
    absent = tmp_path / "absent"
    assert main(["doctor", f"--data={absent}", "--config=absent.py"]) == 2
    said = capsys.readouterr()
    assert said.err == "dino-jax: error: missing: config, data; the fix for each is above\n"
    found = json.loads(said.out.splitlines()[-1])
    assert found["ok"] is False
    assert (found["checks"]["config"], found["checks"]["data"]) == ("missing", "missing")
    assert "-> " in said.out


def test_the_devices_of_this_machine_answer(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    (check,) = machine.devices()
    assert check.state == "ok"
    assert check.found.startswith("2 cpu, JAX ")


def test_what_starts_others_needs_no_devices(answer, monkeypatch, config):
    monkeypatch.setattr(machine, "_ask", lambda config: pytest.fail("asked"))
    found = checks(config=config, launch="tpu", devices=12)
    assert not {"devices", "packages", "memory"} & set(found)
    assert found["batch"].state == "missing"
    assert found["data"].state == "ok"


def test_keys_without_a_configuration():
    with pytest.raises(UserError, match=r"--config.epochs=3: keys need the configuration.*--config=FILE"):
        list(doctor.doctor(overrides=["--config.epochs=3"]))


# --- Python and packages


@pytest.mark.parametrize(("version", "state"), [((3, 10, 9), "missing"), ((3, 12, 1), "ok"), ((3, 14, 0), "warn")])
def test_python(monkeypatch, version, state):
    info = collections.namedtuple("info", "major minor micro")(*version)
    monkeypatch.setattr(sys, "version_info", info)
    assert machine.python().state == state


def test_packages_absent_old_and_other(monkeypatch, tmp_path):
    (tmp_path / "constraints.txt").write_text("numpy==2.9.0\npillow==11.5\njax==0.10.2\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    there = {"numpy": "2.8.1", "jax": "0.10.2"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    wanted = ["numpy>=2", "jax>=0.10", "Pillow>=11 ; python_version < '4'", 'torch ; extra == "peers"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(importlib.metadata, "version", version)
    (check,) = machine.packages()
    assert (check.state, check.found) == ("missing", "pillow")
    assert check.fix == "pip install -c constraints.txt pillow"
    there["pillow"] = "10.4"
    (check,) = machine.packages()
    assert (check.state, check.found) == ("missing", "pillow>=11 (is 10.4)")
    there["pillow"] = "11.5+local"
    (check,) = machine.packages()
    assert (check.state, check.found) == ("warn", "numpy 2.8.1 (tested: 2.9.0)")
    there["numpy"] = "2.9.0"
    (check,) = machine.packages()
    assert (check.state, check.found) == ("ok", "3 packages, all as in constraints.txt")


def test_pins_follow_the_python(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text(
        '# pins\na==1\nb==1 ; python_version < "3.12"\nb==2 ; python_version >= "3.12" and python_version < "3.13"\n'
    )
    assert machine.pinned(path, (3, 11)) == {"a": "1", "b": "1"}
    assert machine.pinned(path, (3, 12)) == {"a": "1", "b": "2"}
    assert machine.pinned(path, (3, 13)) == {"a": "1"}
    assert machine.pinned(tmp_path / "absent") == {}


# --- devices


def test_hardware_by_its_device_files(tmp_path):
    assert machine.hardware(tmp_path) is None
    vendor = tmp_path / "sys/bus/pci/devices/0000:00:05.0/vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x1ae0\n")  # Google's network card
    assert machine.hardware(tmp_path) is None
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/0").touch()
    assert machine.hardware(tmp_path) == "tpu"
    vendor.write_text("0x10de\n")
    (tmp_path / "dev/nvidia0").touch()
    assert machine.hardware(tmp_path) == "gpu"
    (tmp_path / "dev/accel0").touch()
    assert machine.hardware(tmp_path) == "tpu"


@pytest.mark.parametrize(("there", "package"), [("tpu", "libtpu"), ("gpu", "jax_cuda12_plugin")])
def test_hardware_without_its_package(answer, monkeypatch, there, package):
    monkeypatch.setattr(machine, "hardware", lambda: there)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == package else object())
    (check,) = machine.devices()
    assert check.state == "missing"
    assert check.found == f"a {there.upper()} is here, and no {package}"
    assert "pip install" in check.fix


def test_hardware_that_jax_passes_over(answer, monkeypatch):
    monkeypatch.setattr(machine, "hardware", lambda: "tpu")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    answer |= {"platform": "cpu", "kind": "cpu", "count": 1}
    (check,) = machine.devices()
    assert (check.state, "unset JAX_PLATFORMS (it is 'cpu')" in check.fix) == ("warn", True)


def test_devices_that_are_wrong_or_silent(answer, monkeypatch):
    answer["wrong"] = "TPU_3"
    (check,) = machine.devices()
    assert (check.state, check.found) == ("missing", "TPU_3 multiplies wrongly")
    monkeypatch.undo()
    monkeypatch.setattr(machine, "hardware", lambda: "tpu")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(machine, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.2)
    (check,) = machine.devices()
    assert check.found == "no answer: nothing came in 0 s"
    assert "on a slice of several hosts ask on all of them at once" in check.fix
    monkeypatch.setattr(machine, "PROBE_SECONDS", 30.0)
    monkeypatch.setattr(machine, "PROBE", "raise RuntimeError('the TPU is already in use by process 7')")
    (check,) = machine.devices()
    assert check.found == "no answer: RuntimeError: the TPU is already in use by process 7"


def test_a_model_that_cannot_be_made(answer):
    answer["refused"] = "model.name='vit_smal': did you mean 'vit_small'?"
    devices, model = machine.devices()
    assert (devices.state, model.state) == ("ok", "missing")
    assert "did you mean" in model.found


@pytest.mark.extra
def test_the_probe_refuses_a_model_without_tracing_it(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = default()
    config.model.name = "vit_smal"
    *_, check = machine.devices(config_io.to_json(config))
    assert (check.name, check.state) == ("model", "missing")
    assert "vit_smal" in check.found


# --- configuration


@pytest.mark.parametrize(
    ("overrides", "devices", "state", "part"),
    [
        ([], 8, "ok", "16 images a step, 2 a device at a time"),
        ([], 3, "missing", "batch_size=16 does not divide by 3"),
        (["--config.run.accum_steps=4"], 8, "missing", "does not divide by 32"),
        (["--config.run.mesh.model=4"], 8, "ok", "8 a device at a time"),
        (["--config.run.mesh.model=4"], 6, "missing", "does not fit 6 device(s)"),
        (["--config.run.mesh.data=2"], 8, "ok", "8 a device at a time"),
        (["--config.run.mesh.data=4", "--config.run.mesh.fsdp=4"], 8, "missing", "does not fit 8 device(s)"),
        (["--config.run.mesh.fsdp=-1"], 8, "missing", "does not fit"),
    ],
)
def test_batch_and_mesh(config, overrides, devices, state, part):
    check = doctor._batch(load(config, *overrides), devices)
    assert check.state == state
    assert part in check.found
    assert bool(check.fix) == (state == "missing")


def test_a_wrong_key_of_the_configuration(answer, config):
    check = checks(config=config, overrides=["--config.optim.lrr=1"])["config"]
    assert check.state == "missing"
    assert "did you mean 'optim.lr'" in check.found


# --- memory, disk, file handles


@pytest.mark.parametrize(("free", "state"), [(0.5, "missing"), (3, "warn"), (64, "ok")])
def test_memory_and_disk(monkeypatch, free, state):
    size = int(free * 2**30)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: f"MemTotal: 1 kB\nMemAvailable:  {size // 1024} kB\n")
    assert machine.memory().state == state
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(size))
    assert machine.disk("runs/x").state == state
    assert machine.disk("gs://bucket/x").state == ("missing" if state == "missing" else "ok")


@pytest.mark.parametrize(("limit", "state"), [(60, "missing"), (512, "warn"), (10_000, "ok")])
def test_file_handles(monkeypatch, limit, state):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    check = machine.files()
    assert (check.state, check.fix) == (state, "" if state == "ok" else "ulimit -n 65536")


# --- the workdir


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    check = doctor._workdir(str(tmp_path / "file" / "run"), None, None)
    assert check.state == "missing"
    assert "cannot be written" in check.found


def test_workdir_of_another_run(config, tmp_path):
    mine, other = load(config), load(config, "--config.optim.lr=1e-3", "--config.run.workers=3")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config_io.to_json(other))
    check = doctor._workdir(str(tmp_path / "run"), mine, None)
    assert check.state == "missing"
    assert "optim.lr: 0.001 -> 0.0005" in check.found
    assert "would go on" in doctor._workdir(str(tmp_path / "run"), other, None).found
    assert os.listdir(tmp_path / "run") == ["config.json"]


@pytest.mark.parametrize("launch", ["tpu", "gke"])
def test_a_cloud_machine_needs_a_bucket(launch):
    check = doctor._workdir("runs/x", None, launch)
    assert (check.state, check.found) == ("missing", "runs/x does not outlive the machine")


@pytest.mark.extra
def test_workdir_in_a_bucket():
    from tests.gcs_stand_in import serve

    code = "from dino_jax.tools.doctor import _workdir; print(_workdir('gs://bucket/run', None, 'tpu'))"
    with serve() as (store, environment):
        command = [sys.executable, "-c", code]
        good = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)
        assert "state='ok'" in good.stdout, good.stdout + good.stderr
        assert not store.objects  # nothing is left behind
    environment["STORAGE_EMULATOR_HOST"] = "http://127.0.0.1:9"
    code = code.replace("print(", "import dino_jax.tools.doctor as d; d.STORE_SECONDS = 3.0; print(")
    command = [sys.executable, "-c", code]
    bad = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)
    assert "state='missing'" in bad.stdout, bad.stdout + bad.stderr
    assert "gcloud auth application-default login" in bad.stdout


# --- data


def test_data_that_opens(tmp_path):
    folder = folder_of_images(tmp_path / "pictures", 3)
    check = doctor._data("data", str(folder), None)
    assert (check.state, check.found) == ("ok", f"{folder}: 3 images; the first: 20 x 30 x 3")


def test_data_with_too_few_images_for_a_batch(config, tmp_path):
    folder = folder_of_images(tmp_path / "pictures", 3)
    check = doctor._data("data", str(folder), load(config))
    assert (check.state, check.fix.split(",")[0]) == ("missing", "--config.batch_size=2")


def test_data_whose_first_image_is_damaged(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    check = doctor._data("data", str(tmp_path), None)
    assert check.state == "missing"
    assert "not an image" in check.found


@pytest.mark.parametrize("spec", ["/nowhere", "tfds", "scene:train", "scenes:train?sise=3", "list:/nowhere.txt", ""])
def test_data_that_does_not_open(spec):
    check = doctor._data("data", spec, None)
    assert check.state == "missing"
    assert check.fix


def test_data_that_takes_for_ever(monkeypatch):
    monkeypatch.setattr(doctor, "DATA_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "open_source", lambda spec: time.sleep(2))
    check = doctor._data("data", "/slow", None)
    assert (check.state, check.found) == ("warn", "/slow: no answer in 0 s")


def test_online_evaluation_needs_its_sources(answer, config):
    arguments = ["--config.eval.knn_every=1", "--config.eval.knn_train=scenes:train?size=4&image_size=16"]
    found = checks(config=config, overrides=arguments)
    assert found["knn_train"].state == "ok"
    assert found["knn_test"].state == "missing"
    assert found["knn_test"].fix == "--config.eval.knn_test=SOURCE"


def test_the_source_given_is_the_one_asked(answer, config):
    assert "size=64" in checks(config=config, data="scenes:train?size=64&image_size=16")["data"].found
    assert sources.split_spec("scenes:train?size=64")[0] == "scenes"


def test_data_that_other_machines_do_not_see(tmp_path):
    check = doctor._data("data", str(tmp_path), None, "gke")
    assert check.state == "missing"
    assert "copy it to a bucket" in check.fix


# --- starting others


@pytest.mark.parametrize("launch", ["tpu", "gke", "slurm", "hosts"])
def test_commands_of_a_launch(monkeypatch, launch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    for name in {name for names in doctor.SETTINGS.values() for name in names}:
        monkeypatch.delenv(name, raising=False)
    found = {check.name: check for check in doctor._launch(launch)}
    for command in doctor.COMMANDS[launch]:
        assert found[command].state == ("warn" if command == "docker" else "missing")
        assert found[command].fix
    assert ("settings" in found) == (launch in doctor.SETTINGS)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "_account", lambda: machine.Check("account", "ok", "me@example.com"))
    for name in doctor.SETTINGS.get(launch, ()):
        monkeypatch.setenv(name, "x")
    assert {check.state for check in doctor._launch(launch)} == {"ok"}


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("echo me@example.com", "ok", "me@example.com"),
        ("echo 'No credentialed accounts.' >&2", "missing", "gcloud is not logged in"),
        (None, "warn", "gcloud does not say"),
    ],
)
def test_the_account_of_gcloud(monkeypatch, tmp_path, script, state, found):
    if script is not None:
        (tmp_path / "gcloud").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor._account()
    assert check.state == state and found in check.found
