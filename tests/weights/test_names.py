"""Released models by name: cache, progress, resume, and network errors, on a local server."""

from __future__ import annotations

import http.server
import threading

import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.weights import importer, names
from dino_jax.weights.pth import write_pth


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with ranges; `server.fault` names what goes wrong."""

    def do_GET(self):
        content, fault = self.server.content, self.server.fault
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.starts.append(start)
        if fault == "absent":
            return self.send_error(404)
        if start and fault != "no ranges":
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
        else:
            start = 0
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Type", "text/html" if fault == "page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of one file, like the release's, with a separate cache."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.fault, server.starts = bytes(range(256)) * 50, None, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(names, "BASE", f"http://127.0.0.1:{server.server_port}/dino/")
        monkeypatch.setenv(names.CACHE, str(tmp_path / "cache"))
        yield server
        server.shutdown()
        thread.join()


def test_downloads_once(server, capsys):
    path = names.fetch("dino_vits16")
    assert path.name == "dino_deitsmall16_pretrain.pth"
    assert path.read_bytes() == server.content
    assert "dino_deitsmall16_pretrain.pth" in capsys.readouterr().err  # progress
    names.fetch("dino_vits16")
    assert server.starts == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_where_it_broke_off(server, ranges):
    server.fault = "cut"
    with pytest.raises(UserError, match="again"):
        names.fetch("dino_vits16")
    server.fault = None if ranges else "no ranges"
    assert names.fetch("dino_vits16").read_bytes() == server.content
    assert server.starts == [0, len(server.content) // 2]


@pytest.mark.parametrize(("fault", "words"), [("absent", "404"), ("page", "web page")])
def test_what_the_server_says_is_said(server, fault, words):
    server.fault = fault
    with pytest.raises(UserError, match=words) as caught:
        names.fetch("dino_vits16")
    assert "--from" in str(caught.value)
    assert not list(names.cache_folder().glob("*.pth"))


def test_a_partial_file_that_is_too_long_is_dropped(server):
    partial = names.cache_folder() / "dino_deitsmall16_pretrain.pth.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(len(server.content) + 1))
    with pytest.raises(UserError, match="removed"):
        names.fetch("dino_vits16")
    assert names.fetch("dino_vits16").read_bytes() == server.content


def test_no_connection(monkeypatch, tmp_path):
    monkeypatch.setenv(names.CACHE, str(tmp_path))
    monkeypatch.setattr(names, "BASE", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="failed"):
        names.fetch("dino_vits16")


def test_unknown_name():
    with pytest.raises(UserError, match="did you mean 'dino_vits16'"):
        names.fetch("dino_vit16")


def test_a_local_file_in_place_of_the_download(tmp_path, load_reference):
    state = {
        k.removeprefix("param/"): v.astype(np.float32) for k, v in load_reference("vit.npz").items() if "param/" in k
    }
    write_pth(tmp_path / "mine.pth", state)
    weights = importer.read("dino_vits16", from_file=tmp_path / "mine.pth", heads=3)
    assert weights.config.model.patch_size == 8
    with pytest.raises(UserError, match="not a released model"):
        importer.read(tmp_path / "mine.pth", from_file=tmp_path / "mine.pth")


def test_every_address_is_the_release():
    assert len(names.PRETRAINED) == 19
    for name, model in names.PRETRAINED.items():
        folder, file = model.file.split("/")
        assert file.startswith(folder)
        assert file.endswith("_full_checkpoint.pth" if name.endswith("_full") else "_pretrain.pth")
        assert model.head is None or model.head == f"{folder}/{folder.removesuffix('_pretrain')}_linearweights.pth"
    with pytest.raises(UserError, match="no linear head"):
        names.fetch("dino_vits16_gldv2", head=True)


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DINO_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache \(\$DINO_JAX_CACHE, the folder of downloads\): cannot be written"):
        names.fetch("dino_vits16")


def test_an_empty_cache_variable_is_no_folder(monkeypatch):
    monkeypatch.setenv(names.CACHE, "")
    assert names.cache_folder().parts[-2:] == (".cache", "dino-jax")
