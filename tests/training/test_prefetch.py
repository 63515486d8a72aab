"""Batches from the host to the devices, also with hostile images and slow sources."""

from __future__ import annotations

import io
import itertools
import logging
import os
import struct
import threading
import time
import zlib

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dino_jax.data.arrays_source import ArraySource
from dino_jax.data.crops import CropParams, render_crops
from dino_jax.data.example import Example
from dino_jax.data.pipeline import make_dataset
from dino_jax.errors import UserError
from dino_jax.parallel import sharding
from dino_jax.training.loop import train
from dino_jax.training.prefetch import BadFiles, device_batches, in_thread
from tests.tiny import tiny_config


def test_a_thread_hands_over_items_then_its_error_and_ends_when_closed():
    def produce():
        yield from range(3)
        raise ValueError("broken")

    items = in_thread(produce, 2)
    assert list(itertools.islice(items, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)
    endless = in_thread(lambda: (item for item in itertools.repeat("x")), 2)
    assert next(endless) == "x"
    endless.close()
    assert "input" not in {thread.name for thread in threading.enumerate()}


def test_bad_files_are_listed_once_also_after_a_restart(tmp_path):
    BadFiles(epath.Path(tmp_path)).note([(3, "é.jpg", "empty"), (3, "é.jpg", "empty")])
    again = BadFiles(epath.Path(tmp_path))
    again.note([(3, "é.jpg", "empty"), (9, "b.jpg", "damaged: x")])
    assert (tmp_path / "bad_files.txt").read_text() == "é.jpg\tempty\nb.jpg\tdamaged: x\n"
    (tmp_path / "folder" / "bad_files.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"bad_files.txt: cannot be read: not a regular file but a folder"):
        BadFiles(epath.Path(tmp_path / "folder"))


def test_odd_names_are_noted_once_and_what_is_there_already_stays(tmp_path):
    path = tmp_path / "bad_files.txt"
    path.write_bytes(b"\xff\xfe\x00\nno tab\nlast without end")
    odd = "a\nb\tc\x1b[31m\r\u2028.jpg"
    for _ in range(2):
        bad_files = BadFiles(epath.Path(tmp_path))
        for _ in range(2):
            bad_files.note([(3, odd, "line\nof\ttwo"), (4, "last without end", "x")])
    kept, line, end = path.read_bytes().rsplit(b"\n", 2)
    assert kept == b"\xff\xfe\x00\nno tab\nlast without end" and not end
    assert line == rb"a\nb\tc\x1b[31m\r\u2028.jpg" + b"\t" + rb"line\nof\ttwo"


def test_crops_on_the_devices_are_those_of_the_pipeline():
    config = tiny_config()
    config.batch_size = 8
    images = np.random.default_rng(0).integers(0, 256, (40, 40, 50, 3), dtype=np.uint8)
    source, mesh = ArraySource(images), sharding.make_mesh(config.run.mesh)
    found = {}
    for render in ("host", "device"):
        config.data.render, config.data.canvas = render, 64
        batches = device_batches(config, source, mesh, position=8, salt=1)
        found[render] = [next(batches).inputs.crops for _ in range(4)]  # more than are prefetched: memory is reused
        batches.close()
    config.data.render = "device"
    rows = make_dataset(source, config, position=8, salt=1)
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    for host, device, batch in zip(found["host"], found["device"], rows, strict=False):
        for row, index in enumerate(batch["index"]):
            params = CropParams(*(value[row] for value in batch["params"]))
            for k, expected in enumerate(render_crops(images[index], params, config.crops)):
                np.testing.assert_allclose(host[k][row], (expected / 255 - mean) / std, atol=1e-5)
                assert np.abs((device[k][row] - host[k][row]) * std * 255).mean() < 2
    rows.close()


class Slow(ArraySource):
    """A source that is slow for every image."""

    def __getitem__(self, index: int) -> Example:
        time.sleep(0.15)
        return super().__getitem__(index)


@pytest.mark.extra
def test_the_log_says_when_the_devices_wait_for_input_and_what_to_change(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dino_jax.training.watch.MIN_PATIENCE", 3)
    config = tiny_config()
    config.batch_size, config.epochs, config.run.mesh.data, config.run.threads = 4, 1, 1, 1
    with caplog.at_level(logging.INFO, "dino_jax"):
        train(config, tmp_path, source=Slow(np.zeros((80, 32, 32, 3), np.uint8)))
    (line,) = [record.message for record in caplog.records if "waiting for input" in record.message]
    assert "run.workers=4 (now 0); data.render=device" in line and "`dino-jax pack`" in line


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that claims to have 3,600 million pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def hostile_images() -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes | None]]]:
    """(suffix, contents) of odd but usable images, and of unusable ones (None: a broken link)."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    jpeg, alpha = encode(plain, "JPEG"), plain.convert("RGBA")
    alpha.putalpha(plain.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16))
    frames = [Image.new("RGB", (30, 20), (k * 80, 0, 0)) for k in range(3)]
    usable = [
        (".jpg", encode(plain, "PNG")),  # wrong extension
        (".png", jpeg),
        (".jpeg", encode(plain.convert("CMYK"), "JPEG")),
        (".jpg", encode(plain.convert("L"), "JPEG")),
        (".png", encode(plain.quantize(7), "PNG")),
        (".png", encode(alpha, "PNG")),
        (".png", encode(deep, "PNG")),
        (".tif", encode(deep, "TIFF")),
        (".gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        (".webp", encode(alpha, "WEBP")),
        (".JPG", encode(plain, "JPEG", exif=turned)),
        (".png", encode(plain.convert("1"), "PNG")),
        (".png", encode(Image.new("RGB", (1, 1)), "PNG")),
        (".png", encode(Image.new("RGB", (4000, 1)), "PNG")),
        (".jpg", encode(Image.new("RGB", (1, 3000)), "JPEG")),
        (".jpg", encode(plain, "JPEG", progressive=True)),
    ]
    broken = [
        (".jpg", b""),
        (".jpg", jpeg[: len(jpeg) // 2]),
        (".png", encode(plain, "PNG")[:300]),
        (".jpg", b"<html>404</html>"),
        (".png", bomb()),
        (".jpg", None),
    ]
    return usable, broken


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of 1,000 hostile images, and the names of the unreadable ones."""
    root = tmp_path_factory.mktemp("hostile")
    usable, broken = hostile_images()
    names = []
    for number in range(1000):
        hopeless = number % 5 == 0
        kinds = broken if hopeless else usable
        suffix, data = kinds[number // 5 % len(kinds)]
        name = f"{number:04d} naïve 写真{suffix}"
        if data is None:
            os.symlink("nowhere", root / name)
        else:
            (root / name).write_bytes(data)
        names += [name] * hopeless
    return root, names


@pytest.mark.extra
@pytest.mark.parametrize("render", ["host", "device"])
def test_a_folder_of_hostile_images_trains_to_the_end_and_resumes_exactly(hostile, tmp_path, render):
    root, broken = hostile
    config = tiny_config()
    config.data.train, config.data.render, config.data.canvas = str(root), render, 64
    config.batch_size, config.epochs, config.data.max_bad_share, config.run.log_every = 100, 1, 0.25, 5
    config.run.mesh.data = 1
    whole = train(config, tmp_path / "whole")
    assert int(whole.step) == 10
    listed = [line.split("\t") for line in (tmp_path / "whole" / "bad_files.txt").read_text().splitlines()]
    assert sorted(name for name, _ in listed) == broken
    assert all(reason for _, reason in listed)
    config.run.stop_after = 6
    for _ in range(2):
        resumed = train(config, tmp_path / "parts")
    assert int(resumed.step) == 10
    for one, other in zip(jax.tree.leaves(whole.student), jax.tree.leaves(resumed.student), strict=True):
        np.testing.assert_array_equal(one, other)
