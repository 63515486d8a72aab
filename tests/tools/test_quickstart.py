"""The quick start as a command."""

from __future__ import annotations

import pytest

from dino_jax.tools.quickstart import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=quikstart"], "--config=quikstart: there is no such file or name; did you mean 'quickstart'?"),
        (["--config.optim.lrr=1"], "--config.optim.lrr=1: there is no key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["--fast"], "--fast: overrides have the form --config.KEY=VALUE"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"quickstart: error: {message}")
