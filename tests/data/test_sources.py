"""Sources: each kind in its real format, and a one-line error for each mistake."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.arrayrecord_source import FORMAT, MANIFEST, VERSION, WRITER_OPTIONS, decode_record, encode_record
from dino_jax.data.arrays_source import ArraySource
from dino_jax.data.decode import BadImage, decode
from dino_jax.data.example import Example
from dino_jax.data.sources import open_source, split_spec
from dino_jax.errors import UserError
from tests.gcs_stand_in import serve


def image_bytes(level: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (level, level, level)).save(buffer, form)
    return buffer.getvalue()


def write(path, level: int = 0, form: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(level, form))


def names(source) -> list[str]:
    return [source[i].name for i in range(len(source))]


def labels(source) -> list[int]:
    return [source[i].label for i in range(len(source))]


def level(example: Example) -> int:
    return int(decode(example.image)[0, 0, 0])


@pytest.fixture
def tree(tmp_path):
    """Two classes, one of them nested, an empty one, and files to skip."""
    root = tmp_path / "tree"
    write(root / "b" / "2.png", 20)
    write(root / "b" / "1.JPEG", 10, "JPEG")
    write(root / "a" / "deep" / "é ü.png", 30)
    write(root / ".hidden" / "x.png")
    write(root / "a" / ".x.png")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    return root


def test_a_tree_of_class_folders_is_sorted_and_labelled(tree, caplog):
    source = open_source(f"folder:{tree}")
    assert source.class_names == ("a", "b", "empty")
    assert names(source) == ["a/deep/é ü.png", "b/1.JPEG", "b/2.png"]
    assert labels(source) == [0, 1, 1]
    assert [level(source[i]) for i in range(3)] == [30, 10, 20]
    assert "1 class folders, such as empty" in caplog.text
    assert names(open_source(str(tree))) == names(source)
    assert names(pickle.loads(pickle.dumps(source))) == names(source)


def test_a_flat_folder_is_unlabelled(tmp_path, caplog):
    for k in (2, 0, 1):
        write(tmp_path / f"{k}.png", k)
    (tmp_path / "sub").mkdir()
    source = open_source(str(tmp_path))
    assert source.class_names is None
    assert names(source) == ["0.png", "1.png", "2.png"]
    assert labels(source) == [-1] * 3
    write(tmp_path / "sub" / "x.png")
    assert names(open_source(str(tmp_path))) == ["sub/x.png"]
    assert "3 images next to the class folders are skipped" in caplog.text


def test_links_are_followed_and_broken_ones_are_bad_images(tree):
    os.symlink(tree / "nowhere.png", tree / "b" / "0.png")
    os.symlink(tree / "b", tree / "c")
    os.symlink(tree, tree / "a" / "loop")
    source = open_source(str(tree))
    gone = "cannot be read: No such file or directory"
    b = ["b/0.png: " + gone, "b/1.JPEG", "b/2.png"]
    assert names_or_bad(source) == ["a/deep/é ü.png", *b, *(name.replace("b/", "c/") for name in b)]


def names_or_bad(source) -> list[str]:
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].name)
        except BadImage as error:
            found.append(f"{error.name}: {error}")
    return found


def test_undecodable_file_names_are_read_and_printable(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png"), "wb") as file:
        file.write(image_bytes(7))
    source = open_source(str(tmp_path))
    assert level(source[0]) == 7
    source[0].name.encode("utf-8")


def test_lists_of_paths(tmp_path, tree):
    flat = tmp_path / "flat.txt"
    flat.write_text("# comment\n\ntree/b/2.png\n" + str(tree / "a" / "deep" / "é ü.png") + "\n", encoding="utf-8")
    source = open_source(f"list:{flat}")
    assert labels(source) == [-1, -1]
    assert [level(source[i]) for i in range(2)] == [20, 30]
    for between in ("\t", ",", " ", ", "):
        flat.write_text(f"tree/b/2.png{between}7\ntree/a/deep/é ü.png{between}-1\n", encoding="utf-8")
        source = open_source(str(flat))
        assert labels(source) == [7, -1]
        assert names(source) == ["tree/b/2.png", "tree/a/deep/é ü.png"]
    flat.write_text("tree/b/2.png\tdog\ntree/b/1.JPEG\tcat\n")
    source = open_source(str(flat))
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [1, 0]


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_in_npz(tmp_path, compressed):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "x.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, images=images, labels=np.arange(5), class_names=list("abcde"))
    for source in (open_source(f"arrays:{path}"), pickle.loads(pickle.dumps(open_source(str(path))))):
        assert isinstance(source.images, np.memmap) is not compressed
        assert source.class_names == tuple("abcde")
        for i in range(5):
            np.testing.assert_array_equal(source[i].image, images[i])
            assert source[i].label == i


def test_npy_stacks_and_arrays_in_memory(tmp_path):
    images = np.zeros((3, 4, 6), np.uint8)
    np.save(tmp_path / "x.npy", images)
    source = open_source(str(tmp_path / "x.npy"))
    assert labels(source) == [-1] * 3
    assert decode(source[2].image).shape == (4, 6, 3)
    assert labels(ArraySource(images, [4, 5, 6])) == [4, 5, 6]


def test_multi_channel_npy_files_in_a_tree(tmp_path):
    for k in range(2):
        (tmp_path / f"c{k}").mkdir()
        np.save(tmp_path / f"c{k}" / "x.npy", np.full((4, 6, 5), k, np.uint8))
    source = open_source(str(tmp_path))
    assert decode(source[1].image, 5).shape == (4, 6, 5)
    assert labels(source) == [0, 1]


def test_scenes():
    source = open_source("scenes:test?size=7&seed=3&image_size=24")
    assert len(source) == 7
    assert decode(source[6].image).shape == (24, 24, 3)
    assert len(pickle.loads(pickle.dumps(source))) == 7


def pack(folder, examples, shards: int = 2) -> None:
    """A folder as `dino-jax pack` writes it."""
    from array_record.python import array_record_module

    files = []
    for k, part in enumerate(np.array_split(np.arange(len(examples)), shards)):
        files.append({"file": f"part-{k}.array_record", "count": len(part)})
        writer = array_record_module.ArrayRecordWriter(str(folder / files[-1]["file"]), WRITER_OPTIONS)
        for i in part:
            writer.write(encode_record(examples[i]))
        writer.close()
    about = {"format": FORMAT, "version": VERSION, "count": len(examples), "class_names": ["x", "y"], "shards": files}
    (folder / MANIFEST).write_text(json.dumps(about))


def test_packed_shards(tmp_path):
    examples = [Example(image_bytes(k), k % 2, f"é{k}.png") for k in range(5)]
    examples.append(Example(np.full((4, 6, 5), 9, np.uint8), -1, "array"))
    pack(tmp_path, examples)
    for source in (open_source(f"arrayrecord:{tmp_path}"), pickle.loads(pickle.dumps(open_source(str(tmp_path))))):
        assert source.class_names == ("x", "y")
        assert [source[i] for i in range(5)] == examples[:5]
        np.testing.assert_array_equal(decode(source[5].image, 5), examples[5].image)
    assert decode_record(encode_record(examples[0])) == examples[0]


def test_a_damaged_packed_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json"):
        open_source(f"arrayrecord:{tmp_path}")
    pack(tmp_path, [Example(image_bytes(k), 0, str(k)) for k in range(4)])
    about = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(about | {"count": 9}))
    with pytest.raises(UserError, match="count is 9 where its shards hold 4 images"):
        open_source(str(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps(about))
    (tmp_path / "part-1.array_record").unlink()
    with pytest.raises(UserError, match=r"part-1.array_record: this shard is missing; the `dino-jax pack` command"):
        open_source(str(tmp_path))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        open_source(str(tmp_path))


def tar(path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_tar_shards(tmp_path):
    tar(
        tmp_path / "t" / "x-08.tar",
        {"d/a.png": image_bytes(1), "d/a.cls": b"7\n", "d/b.cls": b"0", "d/b.seg.png": image_bytes(2)},
    )
    tar(
        tmp_path / "t" / "x-09.tar",
        {"d/a.json": b'{"label": 3, "x": [1]}', "d/a.é.png": image_bytes(3), "d/a.txt": b"?"},
    )
    for spec in ("tar:{}/t", "tar:{}/t/x-*.tar", "tar:{}/t/x-{{08..09}}.tar"):
        source = pickle.loads(pickle.dumps(open_source(spec.format(tmp_path))))
        assert names(source) == ["d/a.png", "d/b.seg.png", "d/a.é.png"]
        assert labels(source) == [7, 0, 3]
        assert [level(source[i]) for i in range(3)] == [1, 2, 3]
        assert source.class_names is None
    tar(tmp_path / "named.tar", {"1.png": image_bytes(1), "1.cls": b"dog", "2.png": image_bytes(2), "2.cls": b"cat"})
    source = open_source(f"{tmp_path}/named.tar")
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [1, 0]
    tar(tmp_path / "plain.tar", {"n01/1.png": image_bytes(1), "n02/1.png": image_bytes(2)})
    assert labels(open_source(f"{tmp_path}/plain.tar")) == [-1, -1]


def test_mistakes_in_tars_are_named(tmp_path):
    members = {"1.png": image_bytes(1), "1.cls": b"1", "2.png": image_bytes(2) * 400}
    tar(tmp_path / "whole.tar", members)
    tar(tmp_path / "squeezed.tar", members, "w:gz")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:3000])
    (tmp_path / "rubbish.tar").write_bytes(b"rubbish" * 100)
    tar(tmp_path / "none.tar", {"a.txt": b"x"})
    tar(tmp_path / "json.tar", {"1.png": image_bytes(1), "1.json": b"{"})
    (tmp_path / "empty").mkdir()
    for name, message in {
        "whole.tar": r"whole.tar: 1 of 2 images have no label",
        "squeezed.tar": r"squeezed.tar: cannot be read as a tar file .*compressed\? gunzip it first",
        "cut.tar": r"cut.tar: cannot be read as a tar file .*cut off\? get it again",
        "rubbish.tar": r"rubbish.tar: cannot be read as a tar file .*damaged",
        "none.tar": r"none.tar: no images in it but 1 file \(.txt 1\), such as a.txt",
        "json.tar": r"json.tar: 1.json: not a label",
        "gone.tar": r"gone.tar: no such tar file",
        "gone-*.tar": r"gone-\*.tar: no such tar file",
        "empty": r"no such tar file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(f"tar:{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data set prepared by TFDS in array_record format, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    folder = tmp_path_factory.mktemp("tfds")

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        pkg_dir_path, url_infos = folder, None  # there is no package to look in
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": io.BytesIO(image_bytes(i)), "label": i % 2}

    TinyImages(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.filterwarnings("ignore")
def test_tfds(tfds_dir):
    source = open_source(f"tfds:tiny_images:train?data_dir={tfds_dir}")
    assert len(source) == 10
    assert source.class_names == ("cat", "dog")
    assert isinstance(source[0].image, bytes)
    assert sorted(level(source[i]) for i in range(10)) == list(range(10))
    assert all(level(source[i]) % 2 == source[i].label for i in range(10))
    part = pickle.loads(pickle.dumps(open_source(f"tfds:tiny_images:1.2.0:test[:50%]?data_dir={tfds_dir}")))
    assert len(part) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny_images:valid?data_dir={}", r"splits: train, test"),
        ("tfds:tiny_images:train?data_dir={}&image=photo", r"no image 'photo' in"),
        ("tfds:tiny_images:train?data_dir={}&label=kind", r"no 'kind' in"),
        ("tfds:cifarr10:train?data_dir={}", r"did you mean 'cifar10'"),
        ("tfds:mnist:train?data_dir={}", r"not prepared in .*tfds build mnist --file_format=array_record"),
        ("tfds:tiny_images?data_dir={}", r"no split"),
    ],
)
def test_tfds_mistakes(tfds_dir, spec, message):
    with pytest.raises(UserError, match=f"(?i){message}") as caught:
        open_source(spec.format(tfds_dir))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [0.7, np.nan, np.inf, 2**40, -2, "cat"])
def test_labels_that_no_class_has_are_named(tmp_path, label):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, label]))
    with pytest.raises(UserError, match=r"a\.npz: images: the label .* is not a class number"):
        open_source(str(tmp_path / "a.npz"))


def test_whole_numbers_of_any_type_are_labels(tmp_path):
    for dtype in (np.float32, np.uint8, np.int64):
        np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 3], dtype))
        assert labels(open_source(str(tmp_path / "a.npz"))) == [0, 3]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"a.png {2**40}\n")
    with pytest.raises(UserError, match=rf"list\.txt: the label {2**40} is not a class number"):
        open_source(str(tmp_path / "list.txt"))


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [{"bytes": image_bytes(k), "path": None} for k in range(6)], "kind": [0, 1] * 3}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "d")
    source = pickle.loads(pickle.dumps(open_source(f"hf:{tmp_path}/d:train")))
    assert source.class_names == ("a", "b")
    assert labels(source) == [0, 1] * 3
    assert [level(source[i]) for i in range(6)] == list(range(6))
    rows = {"img": rows["img"], "kind": ["dog", "cat", None] * 2, "score": [0.7] * 6}
    datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()).save_to_disk(tmp_path / "w")
    source = open_source(f"hf:{tmp_path}/w:train?label=kind")
    assert source.class_names == ("cat", "dog") and labels(source) == [1, 0, -1] * 2
    with pytest.raises(UserError, match=r"w:train, column score: the label 0\.7 is not a class number"):
        open_source(f"hf:{tmp_path}/w:train?label=score")[0]
    for spec, message in [
        (f"hf:{tmp_path}/d:test", "no split 'test'"),
        (f"hf:{tmp_path}/d:train?image=kind", "no image 'kind'"),
        ("hf:nobody/nothing:train", "hf:nobody/nothing:train: "),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(spec)


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_folders_and_odd_columns(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for k in range(4):
        write(tmp_path / "folder" / "train" / "ab"[k % 2] / f"{k}.png", k)
    source = open_source(f"hf:{tmp_path}/folder:train")
    assert source.class_names == ("a", "b") and sorted(labels(source)) == [0, 0, 1, 1]
    image = [{"bytes": image_bytes(k), "path": None} for k in range(3)]
    plain = datasets.Dataset.from_dict({"image": image, "label": [True, False, None]})  # without the type of images
    (tmp_path / "parquet").mkdir()
    plain.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    source = open_source(f"hf:{tmp_path}/parquet:train")
    assert [level(source[k]) for k in range(3)] == [0, 1, 2] and labels(source) == [1, 0, -1]

    def saved(name: str, **columns) -> str:
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path}/{name}:train"

    source = open_source(saved("holes", image=[image[0], None]))
    assert names_or_bad(source) == [
        "train-0000000",
        "train-0000001: there is no image in this row",
    ]
    spec = saved("score", image=image, label=[0.2, 0.7, 1.3])
    assert labels(open_source(spec)) == [-1] * 3
    assert "the label 0.2 is not a class number" in caplog.text and "the images are unlabeled" in caplog.text
    with pytest.raises(UserError, match=r"column label: the label 0\.2 is not a class number"):
        open_source(f"{spec}?label=label")
    assert labels(open_source(saved("lists", image=image, label=[[1], [2], []]))) == [-1] * 3
    two = datasets.Dataset.from_dict({"left": image, "right": image})
    for side in ("left", "right"):
        two = two.cast_column(side, datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"images in left, right: say which: \?image=left"):
        open_source(f"hf:{tmp_path}/two:train")
    assert len(open_source(f"hf:{tmp_path}/two:train?image=right")) == 3


def test_specs_are_split_by_kind_not_by_url_scheme(tmp_path):
    assert split_spec("scenes:train?size=5&seed=1") == ("scenes", "train", {"size": "5", "seed": "1"})
    assert split_spec("folder:gs://bucket/x") == ("folder", "gs://bucket/x", {})
    assert split_spec("tfds:imagenet2012:train[:10%]")[1] == "imagenet2012:train[:10%]"
    odd = tmp_path / "with:colon"
    write(odd / "x.png")
    assert split_spec(str(odd))[0] == "folder"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none", "no such file or folder"),
        ("folder:{}/none", "no such folder"),
        ("folder:{}/picture.png", "not a folder"),
        ("{}/strange.bin", "not a folder, a list"),
        ("{}/text/*.png", "no image file matches it"),
        ("{}/empty", "the folder is empty; put images there or name another"),
        ("{}/text", "no images in it .*; put images there or name another"),
        ("list:{}/none.txt", "no such list"),
        ("{}/blank.txt", "names no images"),
        ("{}/missing.txt", "2 of 3 files are missing, first gone.png"),
        ("{}/halfway.txt", "1 of 2 images have no label"),
        ("arrays:{}/none.npz", "no such file"),
        ("{}/other.npz", "no array 'images' in it .it has pixels"),
        ("{}/counts.npz", "3 of them but 2 labels"),
        ("{}/shape.npz", "must be .N, H, W. or .N, H, W, C., not of shape .3,"),
        ("{}/rubbish.npz", "cannot be read as arrays"),
        ("{}/none.npy", "no such file"),
        ("foldr:{}", "unknown kind of source 'foldr' .*did you mean 'folder'"),
        ("scenes:train?sise=3", "unknown option 'sise' .*did you mean 'size'"),
        ("folder:{}?size=3", "unknown option 'size'"),
        ("scenes:train?size", "must read key=value"),
        ("scenes:train?size=many", "size must be a whole number"),
        ("folder:", "nothing after"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, spec, message):
    write(tmp_path / "picture.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.txt").write_text("x")
    (tmp_path / "strange.bin").write_text("x")
    (tmp_path / "blank.txt").write_text("# nothing\n")
    (tmp_path / "missing.txt").write_text("gone.png\npicture.png\ngone too.png\n")
    (tmp_path / "halfway.txt").write_text("picture.png 1\npicture.png\n")
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    np.savez(tmp_path / "counts.npz", images=np.zeros((3, 2, 2), np.uint8), labels=np.zeros(2))
    np.savez(tmp_path / "shape.npz", images=np.zeros(3, np.uint8))
    (tmp_path / "rubbish.npz").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


REMOTE = """
import json, sys
from dino_jax.data.decode import BadImage, decode
from dino_jax.data.sources import open_source

for spec in sys.argv[1:]:
    source = open_source(spec)
    examples = [source[i] for i in range(len(source))]
    print(json.dumps([[e.name, e.label, int(decode(e.image)[0, 0, 0])] for e in examples]))
try:
    open_source("list:gs://bucket/broken.txt")[0]
except BadImage as error:
    print(json.dumps(f"{error.name}: {error}"))
"""


@pytest.mark.extra
def test_sources_in_a_bucket(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.full((2, 4, 4), 9, np.uint8), labels=[5, 6])
    objects = {
        "tree/a/1.png": image_bytes(1),
        "tree/b/deep/2.png": image_bytes(2),
        "flat/3.png": image_bytes(3),
        "list.txt": b"tree/a/1.png 7\nflat/3.png 8\n",
        "broken.txt": b"gone.png\n",
        "x.npz": buffer.getvalue(),
    }
    with serve() as (store, environment):
        for name, data in objects.items():
            store.put(f"bucket/{name}", data, {})
        specs = ["gs://bucket/tree", "folder:gs://bucket/flat", "gs://bucket/list.txt", "arrays:gs://bucket/x.npz"]
        child = subprocess.run(
            [sys.executable, "-c", REMOTE, *specs], env=os.environ | environment, capture_output=True, text=True
        )
    assert child.returncode == 0, child.stderr
    *found, bad = [json.loads(line) for line in child.stdout.splitlines()]
    assert found == [
        [["a/1.png", 0, 1], ["b/deep/2.png", 1, 2]],
        [["3.png", -1, 3]],
        [["tree/a/1.png", 7, 1], ["flat/3.png", 8, 3]],
        [["000000", 5, 9], ["000001", 6, 9]],
    ]
    assert bad.startswith("gone.png: cannot be read: ")
