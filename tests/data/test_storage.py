"""Atomic writes, to disk and to a bucket."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from dino_jax.data.storage import absolute, is_remote, new_file, write_atomically
from tests.gcs_stand_in import serve


def test_what_is_remote():
    assert is_remote("gs://bucket/run")
    assert not is_remote(pathlib.Path("/tmp/run"))


def test_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(absolute("run")) == str(tmp_path / "run")
    assert str(absolute("~/run")) == "/home/someone/run"
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, "émile\n")
    assert path.read_bytes() == "émile\n".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with contextlib.suppress(RuntimeError), new_file(path) as local:
        local.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


IN_A_BUCKET = """
    from etils import epath
    from dino_jax.data.storage import new_file, write_atomically

    write_atomically("gs://bucket/a/text", "text")
    with new_file("gs://bucket/a/file.npz") as local:
        assert local.name == "file.npz"
        local.write_bytes(b"bytes")
    try:
        with new_file("gs://bucket/a/failed") as local:
            local.write_bytes(b"half")
            raise RuntimeError
    except RuntimeError:
        pass
    assert epath.Path("gs://bucket/a/text").read_text() == "text"
    assert not local.exists()
"""


@pytest.mark.extra
def test_in_a_bucket():
    with serve() as (store, environment):
        paths = os.pathsep.join(filter(None, sys.path))
        code = "if True:" + IN_A_BUCKET
        subprocess.run([sys.executable, "-c", code], env=os.environ | environment | {"PYTHONPATH": paths}, check=True)
    assert sorted(name for name in store.objects if not name.endswith("/")) == ["bucket/a/file.npz", "bucket/a/text"]
