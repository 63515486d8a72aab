"""What a run finds in its workdir before it starts."""

from __future__ import annotations

import pytest
from etils import epath

from dino_jax import config_io
from dino_jax.errors import UserError
from dino_jax.training.claims import claim
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "config.json: not UTF-8 text"),
        (b"{", r"config\.json"),
        (b'{"epochs": "300"}', r"config\.json.*epochs"),
        (b"[" * 10_000, r"config\.json"),
    ],
)
def test_a_damaged_configuration_is_one_line_and_stays(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        claim(epath.Path(tmp_path), tiny_config())
    assert "\n" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_workdir_belongs_to_one_configuration_but_for_how_it_runs(tmp_path):
    config = tiny_config()
    claim(epath.Path(tmp_path), config)
    config.run.prefetch = 5
    claim(epath.Path(tmp_path), config)
    assert config_io.from_json((tmp_path / "config.json").read_text()).run.prefetch == 5
    config.optim.lr = 0.1
    with pytest.raises(UserError, match=r"another configuration \(optim\.lr: 0\.0005 -> 0\.1\)"):
        claim(epath.Path(tmp_path), config)
