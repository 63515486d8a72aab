"""Reading regular files only, and atomic writes, to disk and to a bucket."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from dino_jax.data.storage import absolute, is_remote, new_file, read_file, read_json, read_text, write_atomically
from dino_jax.errors import UserError
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


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"not a regular file but {kind}"):
            read_file(path)
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link") == b"content"


def test_files_that_are_not_what_they_should_be(tmp_path):
    path = tmp_path / "file"
    for content, message in (
        (b"\xff\xfe", "file: not UTF-8 text: byte 0 is 0xff"),
        (b'{"a": 1', "file: not JSON"),
        (b"[" * 100_000, "file: not JSON"),
        (b"[1]", "file: holds list where an object is expected"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_json(path)
    with pytest.raises(UserError, match=r"absent: cannot be read: No such file"):
        read_text(tmp_path / "absent")
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(path) == {"a": [1]}
