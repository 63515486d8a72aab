"""The wheel, with the newest dependencies in an empty environment: it trains from a shell and in a notebook."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.extra

ROOT = pathlib.Path(__file__).parent.parent
OFFLINE = r"Retrying|ConnectionError|name resolution|Name or service not known|timed out|ProxyError|SSLError"
# Two steps of the configuration `quickstart`, small.
OVERRIDES = {
    "data.train": "scenes:train?size=16&image_size=32",
    "epochs": 1,
    "batch_size": 8,
    "model.patch_size": 8,
    "model.embed_dim": 32,
    "model.depth": 1,
    "model.heads": 2,
    "head.out_dim": 64,
    "crops.global_size": (32, 32),
    "crops.local_size": (16, 16),
    "run.log_every": 1,
}
NOTEBOOK = """
import json, sys
import nbclient, nbformat

cells = [nbformat.v4.new_code_cell(source) for source in json.load(sys.stdin)]
nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=300, kernel_name="python3").execute()
print(json.dumps([cell.outputs for cell in cells]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the wheel, the environment and the runs are: nowhere near the checkout."""
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def environment(folder):
    """Variables of a user's shell: none of the tests' own for Python, XLA and pip's constraints."""
    ours = ("PYTHON", "XLA_", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    jupyter = {f"JUPYTER_{kind}_DIR": str(folder / "jupyter") for kind in ("CONFIG", "DATA", "RUNTIME")}
    jax = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    return kept | jax | jupyter | {"IPYTHONDIR": str(folder / "ipython")}


@pytest.fixture(scope="module")
def wheel(folder, environment):
    pip(["wheel", "--no-deps", f"--wheel-dir={folder}", str(ROOT)], sys.executable, folder, environment)
    (found,) = folder.glob("dino_jax-*.whl")
    return found


@pytest.fixture(scope="module")
def venv(folder, environment, wheel):
    """The folder of the environment's programs."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, env=environment, capture_output=True)
    programs = folder / "venv" / "bin"
    pip(["install", "--no-compile", str(wheel), "ipykernel", "nbclient"], programs / "python", folder, environment)
    return programs


def pip(arguments, python, folder, environment):
    """Runs pip; skips the test if it cannot reach a package index."""
    command = [str(python), "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode and re.search(OFFLINE, said):
        pytest.skip("pip cannot reach a package index")
    assert done.returncode == 0, said[-3000:]


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_holds_configurations_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"dino_jax/configs/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.py")}
    assert configs and configs | {"dino_jax/py.typed"} <= names
    assert all(name.startswith(("dino_jax/", "dino_jax-")) for name in names)


def test_it_trains_by_name_from_any_folder(venv, folder, environment):
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    command = [venv / "dino-jax", "train", "--config=quickstart", "--workdir=run", *overrides]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps(folder / "run") == [1, 2]
    assert (folder / "run" / "checkpoints" / "2").is_dir()


def test_it_trains_in_a_notebook(venv, folder, environment):
    settings = [f"config.{key} = {value!r}" for key, value in OVERRIDES.items()]
    setup = "\n".join(["import dino_jax", "config = dino_jax.load_config('quickstart')", *settings])
    cells = json.dumps([setup, "dino_jax.train(config, 'notebook')"])
    command = [venv / "python", "-c", NOTEBOOK]
    done = subprocess.run(command, cwd=folder, env=environment, input=cells, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nothing, outputs = json.loads(done.stdout)
    assert nothing == []
    assert steps(folder / "notebook") == [1, 2]
    *shown, result = outputs
    assert all(output["name"] == "stderr" for output in shown)
    assert sum(output["text"].count("\n") for output in shown) < 10
    assert result["data"]["text/plain"].startswith("TrainState(step=2, parameters=")
    assert "\n" not in result["data"]["text/plain"]
