"""Folders as they are found: files that are no images, never end, or would fill the memory."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dino_jax.data import decode as decoding
from dino_jax.data import folder_source, pack, storage
from dino_jax.data.arrayrecord_source import encode_record
from dino_jax.data.decode import BadImage, decode
from dino_jax.data.example import Example
from dino_jax.data.shards import Tally
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval.images import read_image, read_labels
from dino_jax.tools.doctor import doctor
from tests.data.test_sources import image_bytes, labels, names, names_or_bad, tar, write


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, color: int = 3) -> bytes:
    """A PNG that declares its size and holds few pixels; a palette with transparency unless `color` says else."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    palette = png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", bytes(256)) if color == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + head + palette + png_chunk(b"IDAT", zlib.compress(bytes(10))) + png_chunk(b"IEND", b"")
    )


def npy(shape: str, dtype: str = "'|u1'", data: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.fixture
def odd_files(tmp_path):
    """A folder with two images and everything that is not a regular file."""
    write(tmp_path / "0.png", 1)
    write(tmp_path / "9.png", 9)
    os.mkfifo(tmp_path / "1.png")
    os.symlink("/dev/zero", tmp_path / "2.png")
    os.symlink("3.png", tmp_path / "3.png")
    os.symlink("/proc/self/pagemap", tmp_path / "4.png")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)
    server.bind("5.png")
    os.chdir(here)
    with open(tmp_path / "6.png", "wb") as file:
        file.truncate(100 << 30)  # without a block on the disk
    yield tmp_path
    server.close()


REASONS = {
    "1.png": "cannot be read: not a regular file but a named pipe",
    "2.png": "cannot be read: not a regular file but a device",
    "3.png": "cannot be read: Too many levels of symbolic links",
    "4.png": "cannot be read: more than 1 MiB",
    "5.png": "cannot be read: ",
    "6.png": "cannot be read: more than 1 MiB",
}


def test_what_is_not_a_regular_file_is_a_bad_image_in_every_source(odd_files, monkeypatch):
    (odd_files / "list.txt").write_text("\r".join([*REASONS, "0.png", "9.png"]))
    monkeypatch.setattr(decoding, "FILE_BYTES", 1 << 20)
    for spec in (f"{odd_files}", f"list:{odd_files}/list.txt", f"file:{odd_files}/*.png"):
        source = open_source(spec)
        found = names_or_bad(source)
        assert len(found) == 8 and {"0.png", "9.png"} <= set(found)
        for name, reason in REASONS.items():
            assert any(line.startswith(f"{name}: {reason}") for line in found), (name, found)
    for name in REASONS:
        with pytest.raises(UserError, match=name):
            read_image(odd_files / name)
        with pytest.raises(UserError, match=name):
            read_labels(odd_files / name)


def test_a_file_that_became_a_folder_is_a_bad_image(tmp_path):
    write(tmp_path / "0.png")
    source = open_source(str(tmp_path))
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").mkdir()
    assert names_or_bad(source) == ["0.png: cannot be read: not a regular file but a folder"]


def test_a_folder_that_cannot_be_read_is_named_and_the_rest_is_used(tmp_path, monkeypatch, caplog):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "b" / "shut" / "2.png")
    write(tmp_path / "b" / "3.png")
    scandir = os.scandir

    def shut(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder_source.os, "scandir", shut)
    source = open_source(str(tmp_path))
    assert names(source) == ["a/1.png", "b/3.png"]
    assert "cannot be read and left out: b/shut/ (Permission denied)" in caplog.text
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        open_source(str(tmp_path / "b" / "shut"))


def test_only_listed_formats_are_opened():
    for form in ("PDF", "EPS", "TGA", "PCX", "SGI", "DDS", "ICNS"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, form)
        with pytest.raises(BadImage, match="known format"):
            decode(buffer.getvalue())
    with pytest.raises(BadImage, match="known format"):
        decode(b"<svg xmlns='http://www.w3.org/2000/svg'/>")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(13_000, 13_000), "169 megapixels, and at most 100 of a PNG are decoded: shrink it"),
        (png(60_000, 60_000), "megapixels, and at most 100 are decoded: shrink it"),
        (npy("(9000, 9000, 3)"), "truncated: 0 bytes where its shape"),
        (npy("(10**30, 9000, 3)"), "damaged"),
        (npy("(-1, 5)"), "damaged"),
        (npy("(1,)", "'|O'", bytes(8)), "damaged: an array of object"),
        (npy("(1,)", "[('a', '|O')]", bytes(8)), "damaged: an array of"),
        (npy("(12000, 12000)", "'|u1'", bytes(144_000_000)), "144 megapixels, and at most 100"),
    ],
)
def test_memory_is_bounded_before_it_is_allocated(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


@pytest.mark.parametrize(("form", "megapixels"), [("WEBP", 41), ("AVIF", 43), ("JPEG2000", 35), ("GIF", 100)])
def test_formats_whose_decoders_need_more_have_lower_limits(form, megapixels):
    image = Image.Image()
    image._size, image.format = (1000, megapixels * 1000), form
    decoding.check_size(image)
    image._size = (1000, (megapixels + 1) * 1000)
    with pytest.raises(BadImage, match=f"at most {megapixels} of a {form}"):
        decoding.check_size(image)


def test_strips_give_the_same_pixels(monkeypatch):
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
    palette = color.quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    wide = Image.fromarray(rng.integers(0, 65536, (40, 30), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    datas = []
    for image, options in ((color, {"exif": exif}), (color.convert("LA"), {}), (palette, {}), (wide, {})):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        datas.append(buffer.getvalue())
    arrays = [*datas, rng.random((40, 30, 3)), rng.integers(0, 256, (40, 30), np.uint8)]
    whole = [decode(data, channels) for data in arrays for channels in (1, 3)]
    tally = Tally()
    tally.add(Example(whole[1], 0, "x"), whole[1])
    monkeypatch.setattr(decoding, "STRIP", 100)
    monkeypatch.setattr(decoding, "LARGE", 0)
    parts = [decode(data, channels) for data in arrays for channels in (1, 3)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    again = Tally()
    again.add(Example(whole[1], 0, "x"), whole[1])
    np.testing.assert_array_equal(tally.moments, again.moments)


def test_a_tiff_that_holds_more_data_than_pixels_is_bad(monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((4, 4, 7), np.uint8), photometric="minisblack", planarconfig="contig")
    data = bytearray(buffer.getvalue())
    assert decode(bytes(data), 7).shape == (4, 4, 7)
    monkeypatch.setattr(decoding, "DECODE_BYTES", 1 << 20)
    bomb = zlib.compress(bytes(20 << 20), 9)
    with pytest.raises(BadImage, match="more data than pixels"):
        decoding._check_deflate(bomb, 4 * 4 * 7)


def test_files_of_other_kinds_are_counted_and_named_once(tmp_path, caplog):
    write(tmp_path / "a" / "0.png")
    for name in ("a/1.heic", "a/2.HEIC", "b/scan", "b/3.dcm", "b/clip.mp4", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    source = open_source(str(tmp_path))
    assert len(source) == 1
    assert source.left_out.startswith("5 files (.heic 2, ")
    assert all(word in source.left_out for word in ("without suffix 1", ".dcm 1", ".mp4 1"))
    assert caplog.text.count("5 files (.heic 2") == 1 and "notes" not in source.left_out
    check = next(check for check in doctor(data=str(tmp_path), launch="slurm") if check.name == "data")
    assert check.state == "warn" and "left out: 5 files" in check.found
    caplog.clear()
    assert len(open_source(f"file:{tmp_path}/*/*")) == 1
    assert "5 files (.heic 2" in caplog.text
    with pytest.raises(UserError, match=r"no images in it but 4 files \(.* such as .*convert them"):
        open_source(str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"matches no image file but 2 files \(.heic 2\)"):
        open_source(f"file:{tmp_path}/a/*.[hH]*")


def test_a_named_file_is_read_whatever_its_suffix(tmp_path):
    write(tmp_path / "scan", 7)
    (tmp_path / "list.txt").write_text("scan\n")
    for spec in (f"file:{tmp_path}/scan", f"list:{tmp_path}/list.txt"):
        assert decode(open_source(spec)[0].image)[0, 0, 0] == 7


def test_names_with_dots_are_samples_of_their_own_in_tars(tmp_path):
    members = {}
    for i in range(3):
        members |= {f"d.v1/img.{i:04}.png": image_bytes(i), f"d.v1/img.{i:04}.cls": str(i).encode()}
    tar(tmp_path / "x.tar", members | {"7.left.png": image_bytes(1), "7.right.png": image_bytes(2), "7.cls": b"5"})
    source = open_source(str(tmp_path / "x.tar"))
    assert labels(source) == [0, 1, 2, 5, 5]
    assert not source.left_out


def test_the_plain_suffix_is_the_image_of_a_sample_in_tars(tmp_path, caplog):
    tar(
        tmp_path / "x.tar",
        {
            **{f"{i}.seg.png": image_bytes(9) for i in range(2)},
            **{f"{i}.png": image_bytes(i) for i in range(2)},
            "2.depth_map.png": image_bytes(9),
            "2.rgb.png": image_bytes(2),
            "1.heic": b"?",
            "3.mask.png": image_bytes(3),
        },
    )
    source = open_source(str(tmp_path / "x.tar"))
    assert names(source) == ["0.png", "1.png", "2.rgb.png", "3.mask.png"]
    assert source.left_out.startswith("4 files (.seg.png 2, .depth_map.png 1, .heic 1), such as 0.seg.png")
    assert caplog.text.count("left out") == 1


def test_a_tar_of_mostly_unknown_suffixes_is_an_error(tmp_path):
    tar(tmp_path / "x.tar", {"0.png": image_bytes(0)} | {f"img.{i}.heic": b"?" for i in range(3)})
    with pytest.raises(UserError, match=r"1 images in it but 3 files \(.heic 3\), such as img.0.heic"):
        open_source(str(tmp_path / "x.tar"))


def sparse_tar(path, name: str, size: int) -> None:
    """A tar with a member in GNU's old sparse format that expands to `size` zeros."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        info = tarfile.TarInfo("0.png")
        data = image_bytes(1)
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[386:410] = f"{size - 512:011o}\0{0:011o}\0".encode()
    head[482:483] = b"\0"
    head[483:495] = f"{size:011o}\0".encode()
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    content = path.read_bytes()
    path.write_bytes(content.rstrip(b"\0").ljust(1024, b"\0")[: (len(content) // 512) * 512])
    with tarfile.open(path, "r:") as file:
        end = file.getmembers()[-1].offset_data + 512
    path.write_bytes(content[:end] + bytes(head) + bytes(1024))


def test_sparse_members_of_tars_are_not_expanded(tmp_path):
    sparse_tar(tmp_path / "label.tar", "0.cls", 6 << 30)
    with pytest.raises(UserError, match=r"label.tar: 0.cls: not a label: sparse"):
        open_source(str(tmp_path / "label.tar"))
    sparse_tar(tmp_path / "image.tar", "1.png", 6 << 30)
    assert names_or_bad(open_source(str(tmp_path / "image.tar"))) == ["0.png", "1.png: a sparse member of a tar"]
    tar(tmp_path / "long.tar", {"0.png": image_bytes(0), "0.cls": bytes(2 << 20)})
    with pytest.raises(UserError, match=r"0.cls: not a label: 2097152 bytes"):
        open_source(str(tmp_path / "long.tar"))


def test_reading_is_bounded_for_files_that_lie_about_their_size(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    assert len(storage.read_file(tmp_path / "x", 11)) == 11
    with pytest.raises(OSError, match="more than 0 MiB"):
        storage.read_file(tmp_path / "x", 10)
    with pytest.raises(OSError, match="more than 0 MiB"):
        storage.read_file("/proc/self/maps", 10)


@pytest.fixture
def packed(tmp_path):
    for k in range(4):
        write(tmp_path / "images" / f"{k}.png", k)
    pack.pack(str(tmp_path / "images"), tmp_path / "out", shard_size=2, workers=1, progress=False)
    return tmp_path / "out"


def test_a_damaged_shard_is_one_line_and_packing_again_repairs_it(packed, tmp_path):
    shard = packed / "pictures-00001-of-00002.array_record"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(encode_record(Example(image_bytes(2), -1, "2.png"))) // 2 + 64] ^= 255
    header = bytearray(whole)
    header[65536] ^= 255
    for content in (whole[:-20], whole[: len(whole) // 2], b"", bytes(header), bytes(len(whole)), None):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(
            UserError, match=r"00001-of-00002.array_record: this shard .*`dino-jax pack` command"
        ) as caught:
            open_source(str(packed))
        assert "\n" not in str(caught.value)
        pack.pack(str(tmp_path / "images"), packed, shard_size=2, workers=1, progress=False)
        assert shard.read_bytes() == whole
    shard.write_bytes(bytes(flipped))
    (bad,) = [line for line in names_or_bad(open_source(str(packed))) if "damaged" in line]
    assert bad.startswith("pictures-00001-of-00002.array_record, record 0: a damaged record")
    check = next(check for check in doctor(data=str(packed), launch="slurm") if check.name == "data")
    assert "Traceback" not in check.found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "version 7, this code reads 1: update"),
        ({"count": -4}, "count is -4"),
        ({"count": "4"}, "count is '4'"),
        ({"class_names": 5}, "class_names is not a list"),
        ({"shards": "ab"}, "shards is not a list"),
        ({"shards": [{"file": "../x", "count": 4}]}, "the file of shard 0 is not the name"),
        ({"shards": [{"file": "/etc/passwd", "count": 4}]}, "the file of shard 0 is not the name"),
        ({"shards": [{"file": "x"}]}, "count of shard 0"),
        ({"shards": [{"file": "x", "count": True}]}, "count of shard 0"),
        ({"shards": [{"file": "x", "count": 4, "bytes": 1.5}]}, "bytes of shard 0"),
    ],
)
def test_mistakes_in_a_manifest_are_named(packed, tmp_path, change, message):
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(manifest | change))
    for act in (lambda: open_source(str(packed)), lambda: pack.pack(str(tmp_path / "images"), packed, workers=1)):
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"{", b"[]", b"[" * 10000, b'{"count": "x"}', b'{"count": 1, "bad": [1]}']
)
def test_damaged_notes_of_an_unfinished_packing_are_one_line_or_made_again(tmp_path, text, monkeypatch):
    for k in range(4):
        write(tmp_path / "images" / f"{k}.png", k)
    arguments = {"shard_size": 2, "workers": 1, "progress": False}
    finish = pack._finish
    monkeypatch.setattr(pack, "_finish", lambda *_: None)
    pack.pack(str(tmp_path / "images"), tmp_path / "out", **arguments)
    monkeypatch.setattr(pack, "_finish", finish)
    (tmp_path / "out" / "pictures-00001-of-00002.json").write_bytes(text)
    settings = (tmp_path / "out" / pack.UNFINISHED).read_bytes()
    (tmp_path / "out" / pack.UNFINISHED).write_bytes(text)
    with pytest.raises(UserError, match=pack.UNFINISHED) as caught:
        pack.pack(str(tmp_path / "images"), tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    (tmp_path / "out" / pack.UNFINISHED).write_bytes(settings)
    assert pack.pack(str(tmp_path / "images"), tmp_path / "out", **arguments)["count"] == 4


def npz(path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data, zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (npy("(4,)", "'|O'", bytes(32)), None),
        (npy("(9000, 9000, 9000)"), None),
        (npy("(10**30, 4, 4)"), None),
        (npy("(1, 2, 2)", data=bytes(4)), npy("(10**9,)", "'<i8'")),
        (npy("(1, 2, 2)", data=bytes(4)), npy("(1,)", "'|O'", bytes(8))),
        (b"\x93NUMPY\x09\x00", None),
        (b"", None),
    ],
)
def test_arrays_of_objects_or_false_shapes_are_refused(tmp_path, images, labels):
    npz(tmp_path / "a.npz", images=images, **({} if labels is None else {"labels": labels}))
    (tmp_path / "a.npy").write_bytes(images)
    for name in ["a.npz", "a.npy"] if labels is None else ["a.npz"]:
        with pytest.raises(UserError, match=f"{name}: cannot be read as arrays: ") as caught:
            open_source(f"arrays:{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
