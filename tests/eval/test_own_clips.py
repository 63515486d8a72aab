"""Own clips in DAVIS's layout: what people have instead of DAVIS, and what is said before the work."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval import davis, masks, run
from dino_jax.eval.draw import palette
from dino_jax.eval.protocols import vos

HEIGHT, WIDTH = 34, 50


def clip(root: pathlib.Path, stems=("00000", "00001", "00002", "00003"), value=1, save=Image.fromarray) -> pathlib.Path:
    """A clip `v` of a moving square; `save` makes the image of a label map."""
    frames, truth = root / "JPEGImages/480p/v", root / "Annotations/480p/v"
    for folder in (frames, truth, root / "ImageSets/2017"):
        folder.mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("v\n")
    for t, stem in enumerate(stems):
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        labels[5 : 15 + t, 4 + t : 16 + t] = value
        Image.fromarray(np.repeat(labels[..., None] // value * 100 + np.uint8(t), 3, -1)).save(frames / f"{stem}.png")
        save(labels).save(truth / f"{stem}.png")
    return root


@pytest.fixture
def settings():
    config = vos.PROTOCOL.default_config()
    config.size, config.multiple, config.threads = 32, 8, 2
    return config


@pytest.fixture
def work(monkeypatch):
    """The names of segmented videos; the segmentation is the first annotation, moved along as the square is."""
    seen = []

    def segment(model, video, first, config):
        seen.append(video.name)
        return np.stack([np.roll(first, t, 1) for t in range(len(video.stems))])

    monkeypatch.setattr(vos, "segment", segment)
    return seen


def colored(labels):
    return Image.fromarray(palette()[labels])


def gray_as_color(labels):
    return Image.fromarray(np.repeat(labels[..., None], 3, -1))


def opaque(labels):
    return gray_as_color(labels).convert("RGBA")


def sixteen(labels):
    return Image.fromarray(labels.astype(np.uint16))


@pytest.mark.parametrize(
    ("value", "save"),
    [(255, Image.fromarray), (255, gray_as_color), (3, colored), (1, sixteen), (255, opaque), (7, Image.fromarray)],
)
def test_masks_in_any_form_score_alike(value, save, vit, settings, work, tmp_path):
    usual = vos.evaluate(vit, str(clip(tmp_path / "usual")), settings)
    assert 0 < usual["J_mean"] < 100
    assert vos.evaluate(vit, str(clip(tmp_path / "other", value=value, save=save)), settings) == usual
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "other/JPEGImages/480p/v").rename(folder / "images")
    (tmp_path / "other/Annotations/480p/v").rename(folder / "masks")
    objects = masks.open_masks(str(folder), "val").load(2).objects  # as `voc` and `dense` read them
    assert (objects > 0).sum() == 17 * 12 - 5 * 12 and objects[6, 7] not in (0, 255)


def resized(path, size):
    with Image.open(path) as image:
        image.resize(size, 0).save(path)


FRAMES, TRUTH = "JPEGImages/480p/v", "Annotations/480p/v"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, m: resized(f / "00002.png", (40, 34)), "v/00002.png: 34 x 40 pixels, but "),
        (lambda f, m: resized(m / "00001.png", (25, 17)), "v/00001.png: 17 x 25 pixels, but "),
        (lambda f, m: [resized(p, (25, 17)) for p in m.iterdir()], "v/00000.png: 34 x 50 pixels, but "),
        (lambda f, m: (m / "00002.png").unlink(), "v/00002.png: no such file"),
        (lambda f, m: (m / "00000.png").unlink(), "v/00000.png: no such file: the first frame needs an annotation"),
        (lambda f, m: (f / "00003.png").write_bytes(b"\x89PNG broken"), "v/00003.png: cannot be read"),
        (lambda f, m: (m / "00001.png").write_bytes(b""), "v/00001.png: cannot be read"),
        (lambda f, m: Image.new("L", (50, 34)).save(m / "00000.png"), "v: the first annotation has no object"),
        (lambda f, m: Image.open(f / "00001.png").save(f / "00001.jpg"), "two frames are named 00001"),
        (lambda f, m: [(f / f"0000{t}.png").unlink() for t in (1, 2, 3)], "v: 1 annotated frames; at least 3"),
        (lambda f, m: [(f / f"0000{t}.png").unlink() for t in (2, 3)], "v: 2 annotated frames; at least 3"),
        (lambda f, m: [(m / f"0000{t}.png").unlink() for t in (1, 2, 3)], "only the first frame is annotated"),
        (lambda f, m: Image.new("RGB", (50, 34), (9, 200, 7)).save(m / "00001.png"), "its color [9, 200, 7] is not"),
        (lambda f, m: Image.new("RGBA", (50, 34), (0, 0, 0, 9)).save(m / "00001.png"), "must not be transparent"),
        (lambda f, m: Image.new("I;16", (50, 34), 300).save(m / "00001.png"), "values up to 255"),
        (lambda f, m: Image.new("L", (50, 34), 9).save(m / "00001.png", "JPEG"), "has lost its values"),
        (lambda f, m: (f.parents[2] / "ImageSets/2017/val.txt").write_text("../v\n"), "../v: not a name"),
        (lambda f, m: (f.parents[2] / "ImageSets/2017/val.txt").write_text("v\nv\n"), "v is listed 2 times"),
        (lambda f, m: (f.parents[2] / "ImageSets/2017/val.txt").write_bytes(b"\xff\xfe"), "not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_before_the_work(damage, message, vit, settings, work, tmp_path):
    root = clip(tmp_path)
    damage(root / FRAMES, root / TRUTH)
    with pytest.raises(UserError) as caught:
        vos.evaluate(vit, str(root), settings)
    assert message in str(caught.value) and not work


def test_frames_are_in_the_order_of_their_numbers(vit, settings, work, tmp_path):
    root = clip(tmp_path, stems=("1", "2", "9", "10", "11"))
    (video,) = vos.open_videos(str(root), "val")
    assert list(video.stems) == ["1", "2", "9", "10", "11"]
    assert [int(video.frame(t)[0, 0, 0]) for t in range(5)] == list(range(5))
    assert vos.evaluate(vit, str(root), settings) == vos.evaluate(vit, str(clip(tmp_path / "x", "abcde")), settings)


def test_a_clip_with_one_annotation_is_segmented_but_not_scored(vit, settings, work, tmp_path, caplog):
    root = clip(tmp_path / "one")
    for t in (1, 2, 3):
        (root / TRUTH / f"0000{t}.png").unlink()
    figures = vos.evaluate(vit, str(root), settings, workdir=str(tmp_path / "work"))
    assert figures == {"unscored_videos": 1} and "only the first frame is annotated" in caplog.text
    (folder,) = (tmp_path / "work").glob("vos-*")
    assert len(list((folder / "v").iterdir())) == 4 and (tmp_path / "work/vos.png").exists()
    vos.evaluate(vit, str(root), settings, workdir=str(tmp_path / "work"))
    assert work == ["v"]  # the maps are read back
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:9, :9] = 1
    Image.fromarray(labels).save(root / TRUTH / "00000.png")
    vos.evaluate(vit, str(root), settings, workdir=str(tmp_path / "work"))
    assert work == ["v", "v"]  # another annotation


def test_a_drawing_or_a_file_that_fails_never_costs_the_figures(vit, settings, work, tmp_path, monkeypatch, caplog):
    root = clip(tmp_path / "clip")
    figures = vos.evaluate(vit, str(root), settings)

    def fails(*_, **__):
        raise RuntimeError("no\nspace")

    for name in ("tile", "save_rows", "save_json", "_save"):
        monkeypatch.setattr(vos, name, fails)
    assert vos.evaluate(vit, str(root), settings, workdir=str(tmp_path / "work")) == figures
    assert "vos.png: not written: no space" in caplog.text


def test_numbers_that_no_object_has_are_not_scored():
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[:, 2:5, 2:5], truth[:, 6:, 6:] = 40, 200
    assert len(davis.score_video(np.zeros_like(truth), truth)) == 2
    assert davis.summarize(davis.score_video(np.zeros_like(truth), truth))["J_mean"] == 0


def test_a_folder_with_both_kinds_of_masks_is_told(tmp_path, caplog):
    for name, value in (("a", 255), ("b", 1)):
        for part, pixels in (("images", 9), ("masks", value)):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.new("L", (8, 8), pixels).save(tmp_path / part / f"{name}.png")
    found = masks.open_masks(str(tmp_path), "val")
    assert [int(found.load(i).objects[0, 0]) for i in (0, 1)] == [255, 1]
    assert "1 masks hold just 0 and 255" in caplog.text


def test_figures_come_before_an_output_that_fails_and_are_valid_json(vit, settings, monkeypatch, tmp_path, capsys):
    protocol = vos.PROTOCOL._replace(run=lambda *_: {"a": float("nan"), "b": np.float32(1.5), "c": float("inf")})
    monkeypatch.setattr(run, "get", lambda name: protocol)
    monkeypatch.setattr(run, "load", lambda *_, **__: vit)
    out = tmp_path / "out.json"
    run.evaluate("vos", "c", "d", out=str(out))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == '{"a": "NaN", "b": 1.5, "c": "Infinity"}' and json.loads(out.read_text()) == json.loads(line)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save_json", full)
    with pytest.raises(UserError, match=r"--out=.*: cannot be written: No space left on device"):
        run.evaluate("vos", "c", "d", out=str(out))
    assert capsys.readouterr().out.splitlines()[-1] == line
