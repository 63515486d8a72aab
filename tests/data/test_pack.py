"""`dino-jax pack`: round trips, interruptions, and one-line errors for what cannot be packed."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dino_jax.cli import main
from dino_jax.data.arrayrecord_source import MANIFEST
from dino_jax.data.decode import decode
from dino_jax.data.pack import UNFINISHED, pack
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from tests.gcs_stand_in import serve

SCENES = "scenes:train?size=90&image_size=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two classes of six images, JPEG and PNG, one of them unreadable."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        path = root / ("cats", "dogs")[number % 2] / f"é{number:02d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + 4 * number, 50, 3), dtype=np.uint8)).save(path)
    (root / "dogs" / "é03.jpg").write_bytes(b"broken")
    return root


def packed(spec, out, **options):
    options = {"shard_size": 5, "workers": 1, "max_bad_share": 0.1, "progress": False} | options
    return pack(str(spec), out, **options)


def contents(out: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_went_in_comes_out(folder, tmp_path):
    manifest = packed(folder, tmp_path)
    before, after = open_source(str(folder)), open_source(f"arrayrecord:{tmp_path}")
    kept = [before[i] for i in range(12) if before[i].name != "dogs/é03.jpg"]
    assert [after[i] for i in range(len(after))] == kept
    assert after.class_names == before.class_names == ("cats", "dogs")
    assert manifest == json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["bad"] == [["dogs/é03.jpg", "not an image in a known format"]]
    assert (manifest["count"], manifest["labels"]) == (11, {"0": 6, "1": 5})
    assert [shard["count"] for shard in manifest["shards"]] == [5, 4, 2]
    assert set(contents(tmp_path)) == {MANIFEST, *(shard["file"] for shard in manifest["shards"])}


def test_the_manifest_measures_the_images(folder, tmp_path):
    manifest = packed(folder, tmp_path)
    source = open_source(str(tmp_path))
    all_images = [decode(source[i].image) / 255 for i in range(len(source))]
    assert manifest["sizes"]["height"] == {
        "min": 30,
        "mean": round(float(np.mean([len(image) for image in all_images])), 1),
        "max": 74,
    }
    assert manifest["sizes"]["width"] == {"min": 50, "mean": 50.0, "max": 50}
    mean = np.mean([image.mean((0, 1)) for image in all_images], axis=0)
    square = np.mean([(image**2).mean((0, 1)) for image in all_images], axis=0)
    np.testing.assert_allclose(manifest["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(manifest["std"], np.sqrt(square - mean**2), atol=1e-5)


def test_a_limit_shrinks_what_exceeds_it_and_leaves_the_rest(folder, tmp_path):
    packed(folder, tmp_path, shorter_side=40)
    before, after = open_source(str(folder)), open_source(str(tmp_path))
    originals = {before[i].name: before[i].image for i in range(12)}
    for example in (after[i] for i in range(len(after))):
        original = originals[example.name]
        height, width = decode(original).shape[:2]
        if min(height, width) <= 40:
            assert example.image == original
            continue
        here, there = Image.open(io.BytesIO(example.image)), Image.open(io.BytesIO(original))
        assert here.format == there.format
        expected = there.resize((40, round(height * 0.8)) if height > width else (round(50 * 40 / height), 40), 3)
        difference = np.abs(np.asarray(here, float) - np.asarray(expected))
        assert difference.max() == 0 if here.format == "PNG" else difference.mean() < 12  # noise: worst for JPEG


def test_arrays_of_many_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 12, 10, 5), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(7))
    manifest = packed(tmp_path / "x.npz", tmp_path / "out", channels=5)
    source = open_source(str(tmp_path / "out"))
    assert len(manifest["mean"]) == 5
    np.testing.assert_array_equal([decode(source[i].image, 5) for i in range(7)], images)
    assert packed(tmp_path / "x.npz", tmp_path / "small", channels=5, shorter_side=6)["sizes"]["height"]["max"] == 7


def test_killed_at_any_moment_it_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    packed(SCENES, whole, shard_size=6)
    command = [sys.executable, "-m", "dino_jax", "pack", SCENES, f"--out={killed}", "--shard-size=6", "--workers=2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("*.array_record"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:  # workers exit with their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    finished = len(list(killed.glob("*.array_record")))
    assert 2 <= finished < 15 and not (killed / MANIFEST).exists()
    with pytest.raises(UserError, match=r"was `dino-jax pack` finished\?"):
        open_source(f"arrayrecord:{killed}")
    times = {path: path.stat().st_mtime_ns for path in killed.glob("*.array_record")}
    first = next(iter(times))
    first.write_bytes(first.read_bytes()[:-100])  # as after a machine crash
    packed(SCENES, killed, shard_size=6)
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [first]
    assert contents(killed) == contents(whole)


def test_damaged_shards_of_a_finished_folder_are_made_anew(folder, tmp_path, capsys):
    out = tmp_path / "out"
    packed(folder, out)
    before = contents(out)
    shards = sorted(out.glob("*.array_record"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].write_bytes(shards[1].read_bytes().replace(b"\x89PNG", b"\x89PNX", 1))
    shards[2].unlink()
    packed(folder, out, progress=True)
    assert contents(out) == before
    assert "3 of 3 shards were damaged and made again" in capsys.readouterr().err
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    packed(changed, tmp_path / "other")
    min((tmp_path / "other").glob("*.array_record")).unlink()
    Image.new("RGB", (20, 20)).save(changed / "cats" / "é02.png")
    with pytest.raises(UserError, match="the source has changed; name another --out"):
        packed(changed, tmp_path / "other")


def test_a_folder_belongs_to_one_source_and_settings(folder, tmp_path):
    packed(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"manifest.json: of another packing \(shorter side 0, now 20\); name another"):
        packed(folder, tmp_path / "out", shorter_side=20)
    (tmp_path / "begun").mkdir()
    begun = {"source": "elsewhere"}
    (tmp_path / "begun" / UNFINISHED).write_text(json.dumps(begun))
    with pytest.raises(UserError, match=r"packing.json: of another packing \(source 'elsewhere', now "):
        packed(folder, tmp_path / "begun")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none", "--out={}/out"], "no such file or folder"),
        (["{}/empty", "--out={}/out"], "the folder is empty"),
        (["{}/good", "--out={}/good"], "not an empty folder; name another"),
        (["{}/good", "--out={}/file/x"], "cannot write there: Not a directory"),
        (["{}/good", "--out={}/file"], "not an empty folder"),
        (["{}/good", "--out={}/out", "--shard-size=0"], "--shard-size: must be a whole number from 1"),
        (["{}/good", "--out={}/out", "--shorter-side=-3"], "--shorter-side: must be a whole number from 0"),
        (["{}/good", "--out={}/out", "--workers=0"], "--workers: must be a whole number from 1"),
        (["{}/good", "--out={}/out", "--channels=7"], "has 3 channels where 7 are expected"),
        (
            ["{}/bad", "--out={}/out", "--workers=1"],
            "at least 2 of 3 images cannot be read, more than --max-bad-share",
        ),
        (["{}/good", "--out={}/out", "--config.seed=1"], "takes no configuration"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path, arguments, message, capsys):
    for name in ("good/1.png", "bad/1.png", "empty/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 5)).save(tmp_path / "good" / "1.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "bad" / "1.png")
    for name in ("2.png", "3.png"):
        (tmp_path / "bad" / name).write_bytes(b"broken")
    (tmp_path / "file").write_text("")
    assert main(["pack", *(argument.format(tmp_path) for argument in arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dino-jax: error: ") and message in line


FULL = """
import resource, sys
from dino_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_gets_one_clear_line_and_it_goes_on(folder, tmp_path):
    command = ["pack", str(folder), f"--out={tmp_path}", "--shard-size=5", "--workers=1", "--max-bad-share=0.1"]
    child = subprocess.run([sys.executable, "-c", FULL, *command], capture_output=True, text=True)
    assert child.returncode == 2
    line = child.stderr.splitlines()[-1]
    assert "array_record: cannot be written: " in line and "run it again: it resumes" in line
    assert list(tmp_path.glob("*.part")) == []
    assert main(command) == 0
    assert len(open_source(str(tmp_path))) == 11


@pytest.mark.extra
def test_shards_go_to_a_bucket(folder, tmp_path):
    command = [sys.executable, "-m", "dino_jax", "pack", str(folder), "--out=gs://bucket/packed", "--shard-size=5"]
    with serve() as (store, environment):
        for line in ("11 images in 3 shards", "11 images in 3 shards"):
            child = subprocess.run(
                [*command, "--workers=1", "--max-bad-share=0.1"],
                env=os.environ | environment,
                capture_output=True,
                text=True,
            )
            assert child.returncode == 0, child.stderr
            assert line in child.stdout
        assert "was packed already; 0 of 3 shards" in child.stderr
        found = {name.rpartition("/")[2]: data for name, (_, data) in store.objects.items()}
    packed(folder, tmp_path)
    here = contents(tmp_path)
    assert found.keys() == here.keys()
    assert all(found[name] == data for name, data in here.items() if name != MANIFEST)


@pytest.mark.extra
@pytest.mark.parametrize("render", ["host", "device"])
def test_a_packed_data_set_trains(folder, tmp_path, render):
    from dino_jax.training.loop import train
    from tests.tiny import tiny_config

    packed(folder, tmp_path / "out")
    config = tiny_config()
    config.data.train, config.data.render, config.data.canvas = f"arrayrecord:{tmp_path / 'out'}", render, 64
    config.batch_size, config.epochs, config.run.mesh.data = 4, 1, 1
    assert int(train(config, tmp_path / "run").step) == 2
