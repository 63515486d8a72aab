"""Small files that claim much: each must be refused in one line, quickly and in little memory.

Run as a program with file names, prints a line of JSON for each: [refusal or null, seconds, peak MB since the start].
"""

from __future__ import annotations

import json
import pickle
import resource
import struct
import sys
import time
import zipfile

STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV%b\nVcpu\nI%d\ntQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def ints(values) -> bytes:
    return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"


def tensor(shape, strides, count=4) -> bytes:
    """The opcodes of one tensor in the storage `0`."""
    return REBUILD + b"(" + STORAGE % (b"0", count) + b"I0\n" + ints(shape) + ints(strides) + b"I00\nNtR"


def shared(depth: int, pair: bytes = b"\x86") -> bytes:
    """A tuple of the same tuple twice, `depth` times."""
    return b")" + (b"2" + pair) * depth


def doubled(depth: int) -> bytes:
    """A list of the same list twice, `depth` times: [[...], [...]]."""
    places = [struct.pack("<I", n) for n in range(depth)]
    return b"]" + b"".join(b"r" + n + b"0](" + (b"j" + n) * 2 + b"e" for n in places)


def pickles() -> dict[str, bytes]:
    """Pickles by what they try."""
    huge = struct.pack("<Q", 1 << 32)
    text = b"X" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    modulus = (1 << 61) - 1
    many = range(200_000)
    return {
        "bytearray": b"\x80\x05\x96" + huge + b".",
        "bytes": b"\x80\x05\x8e" + huge + b".",
        "text": b"\x80\x05\x8d" + huge + b".",
        "long": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
        "bytes in a frame": b"\x80\x05\x95" + struct.pack("<Q", 12) + b"\x96" + huge + b"...",
        "a frame": b"\x80\x05\x95" + huge + b".",
        "tuples as a key": b"}" + shared(60) + b"Ns.",
        "tuples in a set": b"\x80\x04\x8f(" + shared(60) + b"\x90.",
        "tuples in a frozenset": b"\x80\x04(" + shared(60) + b"\x91.",
        "tuples in a dict": b"(" + shared(60) + b"Nd.",
        "tuples in an OrderedDict": b"ccollections\nOrderedDict\n(](" + shared(60) + b"N\x86etR.",
        "deep tuples as a key": b"})" + b"\x85" * 400_000 + b"Ns.",
        "shared lists": b"}Vteacher\n" + doubled(60) + b"s.",
        "shared tuples as arguments": b"}Vteacher\n}sVargs\n}Vlr\n" + shared(60) + b"ss.",
        "marks": b"(" * (8 << 20) + b".",
        "dicts": b"}" * (8 << 20) + b".",
        "sets": b"\x80\x04" + b"\x8f" * (8 << 20) + b".",
        "memo": b"\x80\x04N" + b"\x94" * (8 << 20) + b".",
        "memo far away": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "colliding memo": b"N" + b"".join(b"p%d\n" % (n * modulus) for n in many) + b".",
        "colliding keys": b"}(" + b"".join(b"L%dL\nN" % (n * modulus) for n in many) + b"u.",
        "encoded again": text + b"q\0"
        + b"0c_codecs\nencode\nq\1(h\0Vlatin1\ntR" + b"h\1(h\0Vlatin1\ntR" * 30_000 + b".",
        "copied dicts": b"ccollections\nOrderedDict\nq\0](" + b"VA\nN\x86" * 20_000 + b"eq\1"
        + b"h\0(h\1tR" * 30_000 + b".",
        "copied namespaces": b"}(" + b"".join(b"V%d\nN" % n for n in range(9_000)) + b"uq\0cargparse\nNamespace\nq\1"
        + b"h\1)Rh\0b" * 60_000 + b".",
        "repeated tensor": b"(" + tensor([1 << 12, 1 << 12], [0, 0]) * 400 + b"l.",
        "overlapping tensors": b"(" + tensor([4096, 4], [1, 1], 1 << 14) * 10_000 + b"l.",
        "a name that a pattern reads again": b"cnumpy\ntesting" + b"." * (1 << 20) + b"\n.",
        "empty but wide": tensor([0, 1 << 70], [1, 1]) + b".",
        "many axes": tensor([1] * 1000, [1] * 1000) + b".",
        "a shape that overflows": b"cnumpy.core.multiarray\n_reconstruct\n)R(I1\n" + ints([1 << 62] * 9)
        + b"cnumpy\ndtype\n(Vf4\ntRI00\nV\ntb.",
    }  # fmt: skip


def archive(path, data: bytes, storage: bytes = bytes(1 << 16)) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)


def legacy(data: bytes) -> bytes:
    """Torch's old format around a pickle."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(start) + data + pickle.dumps(["0"], 2) + struct.pack("<Q", 1 << 40)


def write_all(folder) -> list:
    """Writes every bomb in the containers that it fits; returns the files."""
    for name, data in pickles().items():
        archive(folder / f"{name}.pth", data)
        (folder / f"{name}.old.pth").write_bytes(legacy(data))
    write_zips(folder)
    write_safetensors(folder)
    return sorted(folder.iterdir())


def write_zips(folder) -> None:
    archive(folder / "sizes.pth", b"N.")
    whole = (folder / "sizes.pth").read_bytes()
    place = whole.index(b"PK\1\2") + 20  # compressed and full size in the directory
    (folder / "sizes.pth").write_bytes(whole[:place] + struct.pack("<II", 1 << 31, 1 << 31) + whole[place + 8 :])
    with zipfile.ZipFile(folder / "compressed.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(64 << 20))
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    count = 400_000
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, len(entry) * count, 30, 0)
    (folder / "members.pth").write_bytes(b"PK\3\4" + bytes(26) + entry * count + end)


def write_safetensors(folder) -> None:
    def write(name, header, data=bytes(64)):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    def entry(shape=(16,), offsets=(0, 64), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    write("length", b"{" + b" " * 7, b"")
    (folder / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    write("overlap", {str(n): entry() for n in range(20_000)})
    write("beyond", {"a": entry(offsets=(0, 1 << 40))})
    write("shape", {"a": entry(shape=[1 << 40, 0])} | {"b": entry(shape=(1 << 62, 4))})
    write("negative", {"a": entry(offsets=(-64, 0))})
    write("text", {"a": {"dtype": ["F32"], "shape": "16", "data_offsets": {}}})
    write("dtype", {"a": entry(dtype="F33")})
    write("nested", b"[" * 3_000_000)
    write("header", b'{"__metadata__":{' + b",".join(b'"%d":[]' % n for n in range(800_000)) + b"}}")
    write("twice", b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2))


if __name__ == "__main__":
    from dino_jax.errors import UserError
    from dino_jax.weights.containers import read_weights

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for file in sys.argv[1:]:
        begin, reason = time.perf_counter(), None
        try:
            read_weights(file)
        except UserError as error:
            reason = str(error)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        print(json.dumps([reason, time.perf_counter() - begin, peak]), flush=True)
