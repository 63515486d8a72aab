"""Protocol records: properties that all share, and a new protocol in a single file."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from dino_jax import config_io
from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.eval import protocol, protocols, run

NEW = '''"""Mean color of the images, a protocol of one file.

What it is for.

Legend: B batch.
"""

from dino_jax.config import Key
from dino_jax.eval.protocol import CROP, Data, Protocol

KEYS = {
    "crop": CROP,
    "space": Key("rgb", "color space", choices=("rgb", "hsv")),
    "power": Key(2.0, "exponent of the mean", "(0, inf)"),
}


def evaluate(model, data, config, workdir=None):
    return {"mean": config.power, "space": config.space}


def fits(folder):
    return (folder / "colors").is_dir()


PROTOCOL = Protocol(run=evaluate, keys=KEYS, data=Data("folder named colors", fits), whole_patches=("crop",))
'''


@pytest.fixture
def dropped(tmp_path, monkeypatch):
    """Installs the file above as protocol `colors`; returns a model to evaluate."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "colors.py").write_text(NEW)
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(folder)])
    backbone = types.SimpleNamespace(patch_size=4)
    model = types.SimpleNamespace(backbone=backbone, variables={}, config=default())
    monkeypatch.setattr(run, "load", lambda checkpoint, heads: model)
    yield "colors"
    sys.modules.pop(f"{protocols.__name__}.colors", None)


@pytest.mark.parametrize("name", protocol.names())
def test_every_protocol_has_defaults_that_pass_its_checks_and_a_help(name):
    found = protocol.get(name)
    config = found.default_config()
    assert config.is_locked and protocol.check(config, found.keys) is config
    assert all(found.keys[key].error(config[key]) is None for key in found.whole_patches)
    text = " ".join(protocol.help_of(name).split())
    assert all(f"--config.{key}" in text and declared.meaning in text for key, declared in found.keys.items())
    first = protocol.about(name).splitlines()[0]
    assert first.endswith(".") and first in protocol.help_of()


def test_the_order_of_all_is_declared():
    assert list(protocol.members()) == ["knn", "linear", "lowshot", "retrieval", "copydetection", "vos", "voc", "dense"]
    with pytest.raises(UserError, match="unknown protocol 'liner'; did you mean 'linear'"):
        protocol.get("liner")


def test_the_list_of_protocols_does_not_import_jax():
    code = "import sys; from dino_jax.eval.protocol import help_of; help_of(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_new_protocol_is_one_file(dropped, tmp_path, capsys):
    assert run.evaluate(dropped, "c", "d", overrides=["--config.power=3"]) == {"mean": 3.0, "space": "rgb"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [["colors", "here"], ["mean", "3.00"], ["space", "rgb"]]
    assert json.loads(lines[-1]) == {"mean": 3.0, "space": "rgb"}
    (tmp_path / "colors").mkdir()
    figures = run.evaluate("all", "c", str(tmp_path), overrides=["--config.colors.space=hsv"])
    assert figures == {"colors/mean": 2.0, "colors/space": "hsv"}
    assert list(protocol.members())[-1] == "colors"


def test_a_new_protocol_has_checks_and_help(dropped):
    for setting, message in (
        ("power=0.0", r"--config\.power=0\.0: must be greater than 0"),
        ("space=hvs", r"--config\.space='hvs': must be one of rgb, hsv; did you mean 'hsv'"),
        ("pover=1.0", r"no key 'pover'; did you mean 'power'"),
        ("crop=35", r"--config\.crop=35: not divisible into patches of 4 pixels: set it to 32"),
    ):
        with pytest.raises(UserError, match=message):
            run.evaluate(dropped, "c", "d", overrides=[f"--config.{setting}"])
    assert "  colors         Mean color of the images, a protocol of one file.\n" in protocol.help_of()
    text = protocol.help_of(dropped)
    assert "What it is for." in text and "Legend" not in text
    assert "--config.space=rgb color space (one of rgb, hsv)" in " ".join(text.split())
    with pytest.raises(UserError, match="did you mean 'colors'"):
        protocol.get("colours")


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("knn", "k=(10, 2.5)", "int values are needed, such as"),
        ("knn", "k=('a',)", "int values are needed, such as"),
        ("linear", "lrs=('a',)", "float values are needed, such as"),
        ("finetune", "seed=-1", "must be between 0 and 4294967295"),
        ("dense", "weight_decay=-0.1", "must be at least 0"),
    ],
)
def test_values_of_the_wrong_kind_are_named_by_their_key(name, setting, message):
    keys = protocol.keys_of(name)
    config = config_io.override(protocol.get(name).default_config(), [f"--config.{setting}"])
    with pytest.raises(UserError, match=rf"--config\.{setting.partition('=')[0]}=.*: {message}"):
        protocol.check(config, keys)
