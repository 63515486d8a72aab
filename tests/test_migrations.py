"""Runs of older versions: they load, export, start other runs, and resume to the bits of the code that wrote them.

`tests/data_old/format_<v>.tar.gz` is a workdir stopped at step 5 of 8, made by the code of that version; the JSON file
beside it tells its center and the end of the same run by the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import textwrap

import jax
import numpy as np
import pytest

import dino_jax
from dino_jax import config_io
from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.migrations import FORMAT_VERSION, migrate
from dino_jax.training.loop import train
from dino_jax.training.metrics import read_metrics
from dino_jax.training.start import start_from
from dino_jax.training.step import init_state, make_recipe, to_items
from dino_jax.weights import checkpoint
from dino_jax.weights.exporter import export_weights
from dino_jax.weights.load import open_weights
from dino_jax.weights.pth import read_pth

DATA = pathlib.Path(__file__).parent / "data_old"
FACTS = json.loads((DATA / "format_1.json").read_text())


@pytest.fixture
def old_run(tmp_path):
    """A copy of the workdir of format 1."""
    with tarfile.open(DATA / "format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "format_1"


@pytest.fixture
def config(old_run):
    return config_io.from_json((old_run / "config.json").read_text())


def test_its_configuration_has_the_keys_of_today(old_run, config):
    saved = json.loads((old_run / "config.json").read_text())
    assert "format_version" not in saved and saved["loss"]["student_temp"] == 0.1
    assert (config.objective.dino.student_temp, config.objective.dino.weight) == (0.1, 1.0)
    assert json.loads(config_io.to_json(config))["format_version"] == FORMAT_VERSION == 2


def test_it_loads_exports_and_starts_another_run(old_run, config, tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    assert np.isfinite(dino_jax.load(old_run).features([image])).all()
    center = np.array(FACTS["center"], np.float32)
    weights = open_weights(old_run, everything=True)
    np.testing.assert_array_equal(weights.objectives["dino"]["center"], center)
    export_weights(old_run, tmp_path / "out.pth", format="official")
    np.testing.assert_array_equal(read_pth(tmp_path / "out.pth")["dino_loss"]["center"], center[None])
    config.init_from = str(old_run)
    state, notes = start_from(init_state(make_recipe(config, 4), jax.random.key(0)), config)
    np.testing.assert_array_equal(state.objectives["dino"]["center"], center)
    np.testing.assert_array_equal(
        state.teacher["params"]["backbone"]["cls_token"], weights.teacher["params"]["backbone"]["cls_token"]
    )
    assert len(notes) == 1


def test_it_resumes_on_shards(old_run, config):
    """The losses of the old run, over other devices: up to rounding."""
    config.run.mesh.update({"data": 2, "fsdp": 2})
    config.run.stop_after = 0
    state = train(config, old_run)
    assert int(state.step) == 8
    losses = [record["loss"] for record in read_metrics(old_run)]
    assert losses[:5] == FACTS["loss"][:5]
    np.testing.assert_allclose(losses[5:], FACTS["loss"][5:], rtol=2e-3)
    assert json.loads((old_run / "config.json").read_text())["format_version"] == FORMAT_VERSION
    assert checkpoint.abstract(old_run / "checkpoints", 8, "rest")["objectives"]["dino"].keys() == {"center"}


RESUME = """
    import pathlib, sys
    import numpy as np
    from dino_jax import config_io
    from dino_jax.training.loop import train
    from dino_jax.training.step import to_items
    from tests.test_migrations import digests

    workdir = pathlib.Path(sys.argv[1])
    config = config_io.from_json((workdir / "config.json").read_text())
    config.run.stop_after = 0
    print("\\n".join(f"{name} {digest}" for name, digest in digests(to_items(train(config, workdir))).items()))
"""


def digests(items) -> dict[str, str]:
    """The beginning of each array's SHA-256, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(items)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    return {name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in flat.items()}


@pytest.mark.extra
@pytest.mark.skipif(jax.__version__ != FACTS["jax"], reason="another compiler rounds otherwise")
def test_it_resumes_to_the_same_bits(old_run):
    environment = os.environ | {
        "XLA_FLAGS": FACTS["xla_flags"],
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    call = [sys.executable, "-c", textwrap.dedent(RESUME), str(old_run)]
    child = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    found = dict(line.split() for line in child.stdout.splitlines())
    expected = migrate(FACTS["end"], 1, "the facts")
    assert {name: found[name] for name in expected} == expected


def test_a_newer_version_gets_one_line_and_is_left_alone(old_run, config):
    folder = old_run / "checkpoints"
    with checkpoint.Checkpointer(folder, keep=2) as checkpoints:
        recipe = make_recipe(config, 4)
        checkpoints.save(6, to_items(init_state(recipe, jax.random.key(0))), config_io.to_json(config))
    (version,) = (folder / "6" / checkpoint.FORMAT).glob("metadata")
    version.write_text('{"format_version": 3}')
    for use in (lambda: open_weights(old_run), lambda: train(config, old_run), lambda: dino_jax.load(folder / "6")):
        with pytest.raises(
            UserError, match=r"6: has format version 3, this code reads up to 2: update dino-jax"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert checkpoint.steps(folder) == [5, 6]
    with pytest.raises(UserError, match=r"^run/config\.json: has format version 9"):
        config_io.from_json('{"format_version": 9, "seed": 0}', "run/config.json")


@pytest.mark.parametrize("key", ["student_temp", "center_momentum"])
def test_an_override_by_its_old_name_is_told_the_new_one(key):
    with pytest.raises(UserError, match=rf"no key 'loss\.{key}'; did you mean 'objective\.dino\.{key}'"):
        config_io.override(default(), [f"--config.loss.{key}=0.2"])
