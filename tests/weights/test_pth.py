"""The restricted `.pth` reader and the writer: against torch if installed, and against hostile files."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import io
import os
import pathlib
import pickle
import random
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.weights.pth import read_pth, write_pth
from dino_jax.weights.unpickle import StandIn


def archive(path, data: bytes, members: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    """A zip with `data` as its pickle and `members` under data/."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (members or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return path


def tensor_pickle(shape, stride, count, offset=0, storage=b"FloatStorage", key="0") -> bytes:
    """The pickle of one tensor, written by hand."""
    ints = lambda values: b"(" + b"".join(f"I{v}\n".encode() for v in values) + b"t"  # noqa: E731
    head = b"ctorch._utils\n_rebuild_tensor_v2\n((" + f"Vstorage\nctorch\n{storage.decode()}\nV{key}\n".encode()
    head += f"Vcpu\nI{count}\ntQI{offset}\n".encode()
    return head + ints(shape) + ints(stride) + b"I00\nccollections\nOrderedDict\n)RtR."


def calls(function: str, argument: str) -> bytes:
    """A pickle that calls `module\\nname` with a string."""
    return f"c{function}\n(V{argument}\ntR.".encode()


def values():
    rng = np.random.default_rng(0)
    return {
        "f4": rng.normal(size=(3, 4)).astype(np.float32),
        "f8": rng.normal(size=(2,)),
        "f2": rng.normal(size=(5,)).astype(np.float16),
        "bf16": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "i8": np.arange(-3, 3),
        "i4": np.arange(4, dtype=np.int32),
        "i2": np.arange(4, dtype=np.int16),
        "i1": np.arange(-2, 2, dtype=np.int8),
        "u1": np.arange(4, dtype=np.uint8),
        "bool": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_writer_and_reader_invert_each_other(tmp_path):
    shared = np.arange(3.0)
    content = {
        "state": collections.OrderedDict(values()),
        "nested": [1, 2.5, None, True, "text", (1, "b")],
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "twice": [shared, shared],
        "transposed": np.arange(6.0).reshape(2, 3).T,
    }
    write_pth(tmp_path / "a.pth", content)
    write_pth(tmp_path / "b.pth", content)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    read = read_pth(tmp_path / "a.pth")
    assert isinstance(read["state"], collections.OrderedDict)
    for name, array in values().items():
        assert read["state"][name].dtype == array.dtype
        np.testing.assert_array_equal(read["state"][name], array)
        assert read["state"][name].shape == array.shape
    assert read["nested"] == content["nested"]
    assert vars(read["args"]) == vars(content["args"])
    assert read["twice"][0] is read["twice"][1]
    np.testing.assert_array_equal(read["transposed"], content["transposed"])


def test_reads_the_official_checkpoint(reference, load_reference):
    checkpoint = read_pth(reference("official_checkpoint.pth"))
    end = load_reference("trajectory_adamw.npz")
    assert checkpoint["args"].arch == "vit_custom"
    assert isinstance(checkpoint["optimizer"]["param_groups"][0]["lr"], np.float64)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0001433047, abs=1e-9)
    for name, array in checkpoint["teacher"].items():
        np.testing.assert_array_equal(array, end[f"teacher/{name}"].astype(np.float32))
    np.testing.assert_array_equal(checkpoint["dino_loss"]["center"], end["center"].astype(np.float32))


@pytest.mark.extra
def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    write_pth(tmp_path / "a.pth", {"teacher": collections.OrderedDict(values()), "epoch": 3, "lr": 1e-3})
    for mmap in (False, True):
        read = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        assert (read["epoch"], read["lr"]) == (3, 1e-3)
        for name, array in values().items():
            tensor = read["teacher"][name]
            assert tuple(tensor.shape) == array.shape
            assert str(tensor.dtype) == f"torch.{array.dtype.name}"
            np.testing.assert_array_equal(tensor.double().numpy(), array.astype(np.float64))


@pytest.mark.extra
def test_reads_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(2, 3, 4)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    content = {
        "views": [base[1, :, ::2], base.permute(2, 0, 1), base[0, 0, 3], base[:, :0], torch.ones(1).expand(5)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "module": module.state_dict(),
        "args": argparse.Namespace(lr=np.float64(0.5), steps=np.int64(7), single=np.float32(0.25)),
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        read = read_pth(tmp_path / "a.pth")
        for mine, theirs in zip(read["views"], content["views"], strict=True):
            np.testing.assert_array_equal(mine, theirs.numpy())
        np.testing.assert_array_equal(read["parameter"], [1, 1])
        assert read["bf16"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read["bf16"].astype(np.float32), [1.5, -2.0])
        np.testing.assert_array_equal(read["module"]["1.running_var"], [1, 1])
        assert (read["args"].lr, read["args"].steps, read["args"].single) == (0.5, 7, 0.25)
    torch.save({"a": os.system}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"posix\.system"):
        read_pth(tmp_path / "old.pth")


HOSTILE = {
    "posix.system": b"cposix\nsystem\n(Vtouch {mark}\ntR.",
    "__builtin__.eval": b"c__builtin__\neval\n(V1\ntR.",
    "builtins.exec": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93(\x8c\x011tR.",  # STACK_GLOBAL
    "os.system": b"(Vtouch {mark}\nios\nsystem\n.",  # INST
    "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(VX\ntR.",
    "torch.load": b"ctorch\nload\n(VX\ntR.",
    "numpy.load": b"cnumpy\nload\n(VX\ntR.",
    "collections.OrderedDict.__init__": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "argparse.ArgumentParser": b"cargparse\nArgumentParser\n)R.",
    "_codecs.encode('zlib_codec')": b"c_codecs\nencode\n(VX\nVzlib_codec\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_named_and_not_run(tmp_path, name):
    mark = tmp_path / "mark"
    data = HOSTILE[name].replace(b"{mark}", os.fsencode(mark))
    with pytest.raises(UserError) as caught:
        read_pth(archive(tmp_path / "bad.pth", data))
    message = str(caught.value)
    assert not mark.exists()
    assert name in message
    assert "bad.pth" in message
    assert "\n" not in message


def test_a_class_with_reduce_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    with pytest.raises(UserError, match=r"(posix|nt)\.system"):
        read_pth(archive(tmp_path / "bad.pth", pickle.dumps({"weight": Evil()}, protocol=2)))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("target", [b"argparse\nNamespace\n", b"torch._utils\n_rebuild_tensor_v2\n"])
def test_build_changes_no_class_or_function(tmp_path, target):
    data = b"c" + target + b"(N(Vpwned\nI1\ndtb."  # BUILD with (None, {"pwned": 1}) sets attributes on anything
    with pytest.raises(UserError, match="damaged"):
        read_pth(archive(tmp_path / "bad.pth", data))
    assert not hasattr(argparse.Namespace, "pwned")


HARMFUL_TENSORS = {
    "beyond the storage": {"shape": [5], "stride": [1], "count": 4},
    "offset beyond": {"shape": [4], "stride": [1], "count": 4, "offset": 1},
    "negative offset": {"shape": [1], "stride": [1], "count": 4, "offset": -4},
    "negative stride": {"shape": [2], "stride": [-1], "count": 4},
    "stride beyond": {"shape": [2], "stride": [1 << 60], "count": 4},
    "repeated to 2^80": {"shape": [1 << 40, 1 << 40], "stride": [0, 0], "count": 4},
    "count that lies": {"shape": [4], "stride": [1], "count": 1 << 40},
    "ranks that differ": {"shape": [4], "stride": [1, 1], "count": 4},
    "absent storage": {"shape": [4], "stride": [1], "count": 4, "key": "7"},
    "a name that climbs": {"shape": [4], "stride": [1], "count": 4, "key": "../data.pkl"},
}


@pytest.mark.parametrize("name", HARMFUL_TENSORS)
def test_tensors_stay_inside_their_storage(tmp_path, name):
    path = archive(tmp_path / "bad.pth", tensor_pickle(**HARMFUL_TENSORS[name]), {"0": bytes(16)})
    with pytest.raises(UserError, match="damaged"):
        read_pth(path)


def test_the_handmade_tensor_is_good(tmp_path):
    path = archive(tmp_path / "good.pth", tensor_pickle([2, 2], [1, 2], 4), {"0": np.arange(4, dtype="f4").tobytes()})
    np.testing.assert_array_equal(read_pth(path), [[0, 2], [1, 3]])


def test_memory_is_not_reserved_on_a_files_word(tmp_path):
    memo = b"\x80\x02Na" + b"r\xff\xff\xff\x7f."  # LONG_BINPUT with index 2^31 - 1
    with pytest.raises(UserError):
        read_pth(archive(tmp_path / "memo.pth", memo))
    with pytest.raises(UserError, match="compressed"):
        read_pth(archive(tmp_path / "bomb.pth", b"N.", {"0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED))


def test_other_files_get_one_clear_line(tmp_path, reference):
    whole = reference("official_checkpoint.pth").read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    word = io.BytesIO()
    with zipfile.ZipFile(word, "w") as file:
        file.writestr("word/document.xml", "<w/>")
    cases = {
        "truncated": whole[:-5000],
        "damaged.*download": bytes(middle),
        "empty": b"",
        "web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
        "web page.": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "no data.pkl": word.getvalue(),
        "bare pickle": pickle.dumps({"a": 1}),
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "not a torch checkpoint": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    for expected, content in cases.items():
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(UserError, match=expected) as caught:
            read_pth(tmp_path / "file.pth")
        assert str(caught.value).startswith(str(tmp_path / "file.pth"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_pth(tmp_path / "absent.pth")


def test_every_truncation_is_an_error_not_a_crash(tmp_path):
    write_pth(tmp_path / "a.pth", {"w": np.arange(10.0), "name": "x"})
    whole = (tmp_path / "a.pth").read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_pth(tmp_path / "cut.pth")


def old_format(tensors: dict[str, np.ndarray]) -> bytes:
    """What torch before 1.6 wrote for a dict of float32 tensors."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    body = b"}"
    for key, (name, array) in enumerate(tensors.items()):
        strides = [n // 4 for n in array.strides]
        one = tensor_pickle(array.shape, strides, array.size, key=str(key))
        one = one.replace(b"cpu\nI%d\ntQ" % array.size, b"cpu\nI%d\nNtQ" % array.size)  # no view
        body += f"V{name}\n".encode() + one[:-1] + b"s"
    parts += [body + b".", pickle.dumps([str(key) for key in range(len(tensors))], 2)]
    return b"".join(parts) + b"".join(x.size.to_bytes(8, "little") + x.tobytes() for x in tensors.values())


def test_the_old_format(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    whole = old_format(tensors)
    (tmp_path / "old.pth").write_bytes(whole)
    read = read_pth(tmp_path / "old.pth")
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)
    for size in range(len(pickle.dumps(0x1950A86A20F9469CFC6C, 2)), len(whole), 7):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_pth(tmp_path / "cut.pth")


def test_other_objects_become_stand_ins(tmp_path):
    content = {
        "args": argparse.Namespace(path=pathlib.PurePosixPath("/a"), when=datetime.datetime(2020, 1, 1), lr=0.5),
        "rng": random.Random(0).getstate(),
        "scores": {(0, 1): 2, frozenset({3}): decimal.Decimal(1)},
        "set": {1, (2, 3)},
        "names": np.array(["x", "y"]),
        "mean": np.array([0.5, 0.25], np.float32),
        "history": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
        "counter": collections.Counter("aab"),
        "flag": re.IGNORECASE,
    }
    for protocol in range(2, 6):
        data = pickle.dumps(content, protocol)
        read = read_pth(archive(tmp_path / "a.pth", data))
        assert read["args"].lr == 0.5
        assert isinstance(read["args"].path, StandIn)
        assert read["args"].path.name.startswith("pathlib")
        assert read["history"] == {"loss": [1.0, 2.0]}
        np.testing.assert_array_equal(read["mean"], [0.5, 0.25])
        assert isinstance(read["names"], StandIn)
        assert 2 in read["scores"].values()
