"""Every argument of every verb with values that make no sense: exit status 2, one line, never a traceback."""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import subprocess
import sys

import pytest

from dino_jax import cli, config_io
from dino_jax.config import KEYS, build, flat_keys
from dino_jax.errors import UserError
from dino_jax.eval.protocol import check, keys_of, names

ROOT = pathlib.Path(__file__).parent.parent
BAD = (
    *(
        "x",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e999",
        "9" * 30,
        "9" * 5000,
        "()",
        "(1,)",
        "None",
        "[" * 200,
        "0x10",
        "1,2",
        "'",
    ),
    *(
        "\x1b[31mred\x07",
        "a\nb",
        "tab\tbed",
        "\N{GRINNING FACE}",
        "a\udcffb",
        "a" * 300,
        "--",
        "~nobody/x",
        "scenes:",
        "hf:x",
    ),
)
# A command line of each verb that fails soon: what it reads is absent.
ABSENT = {
    "bench": ["loss", "--config=absent"],
    "doctor": ["--config=absent", "--launch=slurm"],
    "eval": ["knn", "--checkpoint=absent", "--data=absent"],
    "export": ["--checkpoint=absent", "--format=timm", "--out=out"],
    "features": ["--checkpoint=absent", "--images=absent", "--out=out.npz"],
    "import": ["absent.pth", "--out=out"],
    "pack": ["absent", "--out=out"],
    "plan": ["--config=absent", "--topology=cpu"],
    "train": ["--config=vit_s16", "--workdir=out", "--config.data.train=absent"],
}


class Recorder:
    """Stands for a parser, and keeps the arguments that a verb declares."""

    def __init__(self):
        self.found: dict[str, dict] = {}

    def add_argument(self, name: str, **options) -> None:
        self.found[name] = options


def arguments() -> list[tuple[str, str, dict]]:
    found = []
    for verb in cli.verbs():
        recorder = Recorder()
        verb.arguments(recorder)
        found += [(verb.name, name, options) for name, options in recorder.found.items() if "action" not in options]
    return found


def changed(command: list[str], name: str, value: str) -> list[str]:
    """The command with another value of one argument."""
    if name.startswith("--"):
        return [*(part for part in command if not part.startswith(f"{name}=")), f"{name}={value}"]
    return [value if place == 0 else part for place, part in enumerate(command)]


def status(command: list[str]) -> int:
    try:
        return cli.main(command)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize(("verb", "name", "options"), arguments(), ids=lambda x: x if isinstance(x, str) else "")
def test_values_that_make_no_sense(verb, name, options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{verb} {name}")
    noise = ["".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randrange(1, 12))) for _ in range(4)]
    for value in ("", *BAD, *noise):
        if value.startswith("-") and not name.startswith("--"):
            continue  # another option
        assert status([verb, *changed(ABSENT[verb], name, value)]) == 2, value
        captured = capsys.readouterr()
        said = captured.err.splitlines()
        assert said and "Traceback" not in captured.err, value
        assert len([line for line in said if line.startswith("dino-jax")]) == 1, captured.err
        assert captured.err.replace("\n", "").isprintable(), captured.err
        if value == "":
            assert "must not be empty" in said[-1] or "must be a" in said[-1] or "invalid choice" in said[-1]


@pytest.mark.parametrize(("verb", "name", "options"), [x for x in arguments() if "type" in x[2]])
def test_numbers_outside_their_range_are_refused_by_the_parser(verb, name, options):
    for value in ("-3", "x", "nan", "inf", "9" * 30, "1.5" if isinstance(options.get("default"), int) else "y", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a"):
            options["type"](value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "some\nfile"), UserError("a\x1b[31m\nb")])
def test_errors_are_one_printable_line(error, monkeypatch, capsys):
    def fails(args, overrides):
        raise error

    monkeypatch.setattr(cli, "verbs", lambda: [cli.Verb("fail", "fail", lambda parser: None, fails)])
    assert cli.main(["fail"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dino-jax: error: ") and said.count("\n") == 1 and said.strip().isprintable()


@pytest.mark.parametrize("protocol", [None, *names()])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(protocol):
    keys = KEYS if protocol is None else keys_of(protocol)
    rng = random.Random(str(protocol))
    for name, key in flat_keys(keys):
        for value in rng.sample(BAD, 6):
            config = build(keys)
            try:
                config_io.override(config, [f"--config.{name}={value}"])
                config_io.check(config) if protocol is None else check(config, keys)
            except UserError as error:
                said = str(error)
                assert name in said and said.isprintable() and len(said) < 600, said
            else:
                assert key.error(config_io.flatten(config)[name]) is None, (name, value)


STREAMS = """
import os, sys
from dino_jax import cli
from dino_jax.progress import track
def run(args, overrides):
    cli._log.warning("a name with \\x1b[31m and a\\nline")
    for _ in track(range(3), "work"): pass
    for _ in range(20000): print("a figure \\udcff")
    open("done", "w").write("done")
cli.verbs = lambda: [cli.Verb("work", "work", lambda parser: None, run)]
sys.exit(cli.main(["work"]))
"""


@pytest.mark.parametrize(
    ("streams", "code", "done"),
    [
        ("2>&- >/dev/null", 0, True),
        ("2</dev/null >/dev/null", 0, True),
        ("<&- >&- 2>&-", 0, True),
        ("2>/dev/full >/dev/null", 0, True),
        (">/dev/full", 2, False),
        ("2>err | head -1 >/dev/null", 141, False),
        ("2>err >/dev/null", 0, True),
    ],
)
def test_closed_streams_end_nothing_but_output(streams, code, done, tmp_path):
    command = f'"$0" -c "$1" {streams}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    end = subprocess.run(
        ["bash", "-c", command, sys.executable, STREAMS], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert end.returncode == code, end.stderr
    assert (tmp_path / "done").exists() is done
    said = end.stderr + ((tmp_path / "err").read_text() if (tmp_path / "err").exists() else "")
    assert "Traceback" not in said and "Exception" not in said and "\x1b" not in said
