"""The pipeline: the same batches from any position, in any number of processes, workers and threads."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import sys

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default
from dino_jax.data.arrays_source import ArraySource
from dino_jax.data.crops import CropParams, draw_crops, render_crops
from dino_jax.data.example import Example
from dino_jax.data.pipeline import (
    center_crop,
    epoch_order,
    example_rng,
    make_dataset,
    make_eval_dataset,
    resize_shorter,
)
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from tests.peers import peer


@pytest.fixture
def config():
    config = default()
    config.batch_size = 20  # two chunks
    config.crops.global_size, config.crops.local_size, config.crops.local_count = (16, 20), (8, 8), 3
    config.data.canvas = 32
    return config


def images_of(count: int, channels: int = 3) -> ArraySource:
    """Distinct images of 24 x 30, labeled by their number."""
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (count, 24, 30, channels), dtype=np.uint8), np.arange(count))


@pytest.fixture
def source() -> ArraySource:
    return images_of(47)


def take(count: int, *arguments, **options) -> list[dict]:
    batches = make_dataset(*arguments, **options)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        for left, right in zip(flat(one[key]), flat(other[key]), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right, err_msg=key)


def flat(value) -> list[np.ndarray]:
    return list(map(np.asarray, value)) if isinstance(value, CropParams) else [np.asarray(value)]


def test_host_batches_have_the_documented_layout(source, config):
    (batch,) = take(1, source, config)
    layout = {key: (value.dtype, value.shape) for key, value in batch.items() if key != "bad"}
    assert layout == {
        "globals": (np.uint8, (20, 2, 16, 20, 3)),
        "locals": (np.uint8, (20, 3, 8, 8, 3)),
        "label": (np.int32, (20,)),
        "index": (np.int64, (20,)),
    }
    assert batch["bad"] == []
    np.testing.assert_array_equal(batch["label"], batch["index"])


def test_device_batches_have_the_documented_layout_and_the_same_crops(source, config):
    hosts = take(3, source, config)
    config.data.render = "device"
    for batch, host in zip(take(3, source, config), hosts, strict=True):
        layout = {key: (value.dtype, value.shape) for key, value in batch.items() if key not in ("bad", "params")}
        assert layout == {
            "canvas": (np.uint8, (20, 32, 32, 3)),
            "size": (np.int32, (20, 2)),
            "label": (np.int32, (20,)),
            "index": (np.int64, (20,)),
        }
        assert {(str(value.dtype), value.shape) for value in batch["params"]} == {
            ("int32", (20, 5, 4)),
            ("bool", (20, 5)),
            ("float32", (20, 5, 4)),
            ("float32", (20, 5)),
        }
        for row, (height, width) in enumerate(batch["size"]):
            canvas = batch["canvas"][row]
            assert (canvas[height:] == 0).all()
            assert (canvas[:, width:] == 0).all()
            np.testing.assert_array_equal(canvas[:height, :width], source.images[batch["index"][row]])
            params = CropParams(*(value[row] for value in batch["params"]))
            large, small = render_crops(canvas[:height, :width], params, config.crops)
            np.testing.assert_array_equal(large, host["globals"][row])
            np.testing.assert_array_equal(small, host["locals"][row])


def test_images_larger_than_the_canvas_are_shrunk_and_their_boxes_with_them(config):
    config.data.render, config.batch_size = "device", 4
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 96, 3), dtype=np.uint8)
    (batch,) = take(1, ArraySource(images), config)
    assert (batch["size"] == (16, 32)).all()
    top, left, height, width = np.moveaxis(batch["params"].box, -1, 0)
    assert (top + height).max() <= 16
    assert (left + width).max() <= 32
    moved: list[int] = []
    for row, index in enumerate(batch["index"]):
        whole = draw_crops(example_rng(config.seed, 0, 0, int(index)), 48, 96, config.crops)
        moved.extend(np.abs(batch["params"].box[row] * 3 - whole.box).max(axis=1))
    assert np.mean(np.array(moved) <= 6) > 0.75  # two pixels of the canvas; rarely, another try fits


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(config):
    source = images_of(40)
    epochs = [np.concatenate([b["index"] for b in take(2, source, config, position=40 * e)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
        assert (epoch != np.arange(40)).any()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    config.seed = 1
    other = np.concatenate([batch["index"] for batch in take(2, source, config)])
    assert (other != epochs[0]).any()
    assert (other != epochs[1]).any()


def test_what_does_not_fill_a_batch_is_left_out_and_differs_between_epochs(source, config):
    left_out = []
    for epoch in range(4):
        seen = np.concatenate([batch["index"] for batch in take(2, source, config, position=40 * epoch)])
        assert len(set(seen)) == 40
        left_out.append(frozenset(range(47)) - set(seen))
    assert len(set(left_out)) == 4


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 70_000])
def test_the_order_is_a_permutation_and_its_places_are_random(count):
    assert sorted(epoch_order(count, 0, 0, range(count))) == list(range(count))
    firsts = [epoch_order(count, seed, 5, [0])[0] for seed in range(300)]
    assert abs(np.mean(firsts) - (count - 1) / 2) < 4 * count / np.sqrt(12 * 300)


@pytest.mark.parametrize("render", ["host", "device"])
def test_a_pipeline_rebuilt_at_a_position_goes_on_exactly(source, config, render):
    config.data.render = render
    whole = take(6, source, config)  # over three epochs of two steps
    for step in (1, 2, 5):
        for rebuilt, original in zip(take(6 - step, source, config, position=20 * step), whole[step:], strict=True):
            assert_same(rebuilt, original)


def test_a_position_within_a_batch_is_refused(source, config):
    with pytest.raises(ValueError, match="not a multiple"):
        make_dataset(source, config, position=7)


def test_the_salt_changes_the_draws_but_not_the_order(source, config):
    (plain,), (salted,) = take(1, source, config), take(1, source, config, salt=1)
    np.testing.assert_array_equal(plain["index"], salted["index"])
    assert (plain["globals"] != salted["globals"]).any(axis=(1, 2, 3, 4)).all()


def test_an_example_is_drawn_anew_in_each_epoch(config):
    source = images_of(20)
    first, second = take(2, source, config)
    rows = np.argsort(first["index"]), np.argsort(second["index"])
    assert (first["globals"][rows[0]] != second["globals"][rows[1]]).any(axis=(1, 2, 3, 4)).all()


@pytest.mark.parametrize("render", ["host", "device"])
@pytest.mark.parametrize("split", [(slice(0, 10), slice(10, 20)), (range(0, 20, 2), range(1, 20, 2)), ([3], [0, 19])])
def test_the_rows_of_each_process_are_its_part_of_the_global_batch(source, config, render, split):
    config.data.render = render
    (whole,) = take(1, source, config)
    for rows in split:
        (part,) = take(1, source, config, batch_slice=rows)
        chosen = np.arange(20)[rows]
        assert_same(part, {key: pick(value, chosen) for key, value in whole.items()})


def pick(value, rows: np.ndarray):
    if isinstance(value, CropParams):
        return CropParams(*(field[rows] for field in value))
    return value if isinstance(value, list) else value[rows]


def test_threads_change_nothing(source, config):
    config.run.threads = 1
    alone = take(3, source, config)
    config.run.threads = 5
    for one, other in zip(alone, take(3, source, config), strict=True):
        assert_same(one, other)


class Probe:
    """A source whose label says whether the reading process has a JAX backend."""

    class_names = None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Example:
        from jax._src import xla_bridge

        return Example(np.zeros((8, 8, 3), np.uint8), int(xla_bridge.backends_are_initialized()), str(index))


@pytest.mark.extra
def test_worker_processes_change_nothing_and_leave_jax_alone(source, config, tmp_path):
    for index, name in enumerate(["a.png", "b.png", "c.png"] * 8):
        Image.fromarray(source.images[index]).save(tmp_path / f"{index}{name}")
    (tmp_path / "00.png").write_bytes(b"broken")
    config.data.max_bad_share = 0.5
    for render, examples in [("host", open_source(str(tmp_path))), ("device", source)]:
        config.data.render, config.run.workers = render, 0
        alone = take(4, examples, config)
        for workers in (2, 4):
            config.run.workers = workers
            for one, other in zip(alone, take(4, examples, config), strict=True):
                assert_same(one, other)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config.run.workers = 2
    (batch,) = take(1, Probe(), config)
    assert (batch["label"] == 0).all()
    assert multiprocessing.active_children() == []


@pytest.mark.extra
def test_errors_of_workers_reach_the_user(config, tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(b"broken" if index else png(0))
    config.run.workers, config.data.max_bad_share = 2, 0.2
    with pytest.raises(UserError, match=r"at least \d+ of 20 images cannot be read") as caught:
        take(2, open_source(str(tmp_path)), config)
    assert "\n" not in str(caught.value)


def test_too_little_shared_memory_for_the_workers_is_said_at_once(source, config, monkeypatch):
    config.run.workers = 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"run.workers: they need .*shm-size"):
        make_dataset(source, config)


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def damaged(tmp_path):
    """60 images, three of them unreadable, one of those a broken link."""
    for index in range(60):
        (tmp_path / f"{index:02d}.png").write_bytes(b"broken" if index in (7, 30) else png(index))
    (tmp_path / "50.png").unlink()
    (tmp_path / "50.png").symlink_to("nowhere.png")
    return open_source(str(tmp_path))


def test_unreadable_images_are_replaced_and_reported(damaged, config):
    config.data.max_bad_share = 0.05
    batches = take(3, damaged, config)
    order = [epoch_order(60, config.seed, 0, range(60))[k : k + 20] for k in (0, 20, 40)]
    reported = [entry for batch in batches for entry in batch["bad"]]
    assert {name: reason for _, name, reason in reported} == {
        "07.png": "not an image in a known format",
        "30.png": "not an image in a known format",
        "50.png": "cannot be read: No such file or directory",
    }
    for batch, expected in zip(batches, order, strict=True):
        same = batch["index"] == expected
        assert {int(i) for i in np.array(expected)[~same]} <= {index for index, *_ in batch["bad"]} <= {7, 30, 50}
        assert not {7, 30, 50} & set(batch["index"])
    for again, batch in zip(take(2, damaged, config, position=20), batches[1:], strict=True):
        assert_same(again, batch)


def test_too_many_unreadable_images_are_an_error_that_names_the_first(damaged, config):
    config.data.max_bad_share = 0.04
    config.data.train = "folder:somewhere"
    with pytest.raises(UserError, match=r"somewhere: at least 3 of 60 .* data.max_bad_share = 0.04; first") as error:
        take(3, damaged, config)
    for name in ("07.png", "30.png", "50.png"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_data_set_without_a_readable_image_is_an_error_at_once(tmp_path, config, share):
    for index in range(25):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    config.data.max_bad_share = share
    with pytest.raises(UserError, match=r"none of the 25 images tried can be read; the last is 9\.png: not"):
        make_dataset(open_source(str(tmp_path)), config)


def test_one_readable_image_is_enough_if_allowed(tmp_path, config):
    for index in range(25):
        (tmp_path / f"{index}.png").write_bytes(png(200) if index == 13 else b"broken")
    config.data.max_bad_share = 1.0
    (batch,) = take(1, open_source(str(tmp_path)), config)
    assert len(set(batch["index"])) == 1


def test_a_batch_larger_than_the_data_set_is_an_error(config):
    with pytest.raises(UserError, match="batch_size = 20 is more than the 19 images"):
        make_dataset(images_of(19), config)


def test_an_unknown_renderer_is_an_error(source, config):
    config.data.render = "gpu"
    with pytest.raises(UserError, match=r"data.render = 'gpu': choose one of host, device"):
        make_dataset(source, config)


@pytest.mark.parametrize("render", ["host", "device"])
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_keep_their_colors_with_a_notice(config, render, channels, caplog):
    config.data.render, config.model.in_chans = render, channels
    (batch,) = take(1, images_of(20, channels), config)
    assert "without color operations" in caplog.text
    if render == "host":
        assert batch["globals"].shape == (20, 2, 16, 20, channels)
    else:
        assert batch["canvas"].shape == (20, 32, 32, channels)
        assert not any(field.any() for field in batch["params"][4:])


def test_evaluation_sees_every_image_once_in_order(source):
    batches = list(make_eval_dataset(source, resize=20, crop=16, batch_size=20))
    assert [batch["valid"].sum() for batch in batches] == [20, 20, 7]
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, [*range(47), *[-1] * 13])
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in batches]), index)
    assert batches[0]["image"].shape == (20, 16, 16, 3)
    assert (batches[2]["image"][7:] == 0).all()
    resized = Image.fromarray(source.images[5]).resize((25, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batches[0]["image"][5], np.asarray(resized)[2:18, 4:20])  # 4.5 rounds to even
    options = {"resize": 20, "crop": 16, "batch_size": 20}
    halves = [list(make_eval_dataset(source, **options, rows=rows)) for rows in (slice(10), slice(10, 20))]
    for whole, left, right in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole["image"], np.concatenate([left["image"], right["image"]]))


def test_evaluation_marks_unreadable_images(damaged):
    batches = list(make_eval_dataset(damaged, resize=0, crop=(8, 9), batch_size=25))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert set(np.flatnonzero(~valid)) == {7, 30, 50, *range(60, 75)}
    assert [name for batch in batches for _, name, _ in batch["bad"]] == ["07.png", "30.png", "50.png"]
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches])[:60], range(60))
    assert (batches[0]["image"][3] == 3).all()


def test_the_evaluation_view_has_torchvisions_sizes():
    assert resize_shorter(np.zeros((375, 500, 3), np.uint8), 256).shape == (256, 341, 3)
    assert resize_shorter(np.zeros((500, 333, 5), np.uint8), 256).shape == (384, 256, 5)
    assert resize_shorter(np.zeros((1, 60000, 3), np.uint8), 256).shape == (256, 4096, 3)
    small = np.full((3, 10, 1), 7, np.uint8)
    found = center_crop(small, (6, 4))
    assert found.shape == (6, 4, 1)
    assert (found[1:4] == 7).all()
    assert (found[[0, 4, 5]] == 0).all()


@pytest.mark.extra
@pytest.mark.parametrize(("height", "width"), [(37, 53), (53, 37), (30, 30), (16, 90), (10, 12)])
def test_the_evaluation_view_equals_torchvisions(height, width):
    transforms = peer("torchvision.transforms")
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = transforms.Compose(
        [
            transforms.Resize(24, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((20, 28)),
        ]
    )
    np.testing.assert_array_equal(center_crop(resize_shorter(image, 24), (20, 28)), view(Image.fromarray(image)))
