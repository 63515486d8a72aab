"""Scenes: deterministic, balanced, with exact masks; color, place and area do not reveal the class."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from dino_jax.data.scenes_render import TEXTURES, coverage, render
from dino_jax.data.scenes_shapes import SHAPES, Dice, moments, normalize
from dino_jax.data.scenes_source import CLASSES, Scenes
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError


def object_of(scene):
    return next(piece for piece in scene.pieces if piece.owner == 1)


def test_example_and_classes():
    scenes = Scenes("train", size=24)
    image, label, name = scenes[5]
    assert len(scenes) == 24 and len(scenes.class_names) >= 10
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert label == scenes.label(5) and scenes.class_names[label] in name
    assert len({example.name for example in scenes}) == 24  # iteration ends at the size
    assert len(set(CLASSES.values())) == len(CLASSES)  # no texture is shared by two classes


def test_a_image_is_a_function_of_seed_split_and_index():
    scenes = Scenes("train", size=100, seed=3)
    again = pickle.loads(pickle.dumps(Scenes("train", size=10**9, seed=3)))
    for index in (99, 0, 41):
        np.testing.assert_array_equal(scenes[index].image, again[index].image)
        np.testing.assert_array_equal(scenes.mask(index), again.mask(index))
        assert scenes[index][1:] == again[index][1:]
    np.testing.assert_array_equal(scenes.clip(7, 3)[0], again.clip(7, 3)[0])
    assert (Scenes("train", seed=4)[0].image != scenes[0].image).any()


def test_splits_share_no_image():
    splits = ("train", "test", "val", "train:picture:1")
    rendered = {Scenes(split, image_size=16)[i].image.tobytes() for split in splits for i in range(60)}
    assert len(rendered) == 240


def test_labels_are_balanced_and_shuffled():
    scenes = Scenes("train", size=1200)
    labels = np.array([scenes.label(i) for i in range(1200)])
    assert np.bincount(labels).tolist() == [100] * 12
    assert (np.bincount(labels[:606]) >= 50).all()
    assert len({tuple(block) for block in labels.reshape(-1, 12)}) == 100


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_unit_area_and_no_offset(name):
    for seed in range(5):
        outline = normalize(SHAPES[name](Dice(np.random.default_rng(seed))))
        total = moments(outline[0]) - sum(moments(hole) for hole in outline[1:])
        np.testing.assert_allclose(total, [0, 0, 1], atol=1e-12)
        assert max(np.hypot(*polygon.T).max() for polygon in outline) < 1.2


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_split_the_plane_evenly(name):
    y, x = np.mgrid[-8:8:320j, -8:8:320j].astype(np.float32)
    shares = [(TEXTURES[name](x, y, cell) > 0).mean() for cell in (0, 700, 3000)]
    assert abs(np.mean(shares) - 0.5) < 0.04
    assert TEXTURES[name](x, y, 0).dtype == np.float32


def test_coverage_is_the_analytic_area():
    square = (np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]),)
    window, share = coverage(square, np.diag([20.0, 10.0]), np.array([30.0, 30.0]), 64, 64)
    assert window == (slice(25, 35), slice(20, 40)) and (share == 1).all()
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    disk = (np.stack([np.cos(angle), np.sin(angle)], 1),)
    _, share = coverage(disk, 15.3 * np.eye(2), np.array([31.7, 30.2]), 64, 64)
    assert share.sum() == pytest.approx(math.pi * 15.3**2, rel=0.01)
    assert coverage(square, np.eye(2), np.array([-5.0, 5.0]), 64, 64) is None


def test_mask_has_the_area_of_the_object():
    scenes = Scenes("test", image_size=128)
    for index in range(24):
        scene = scenes.scene(index)
        thing = object_of(scene)
        thing = thing._replace(matrix=0.6 * thing.matrix, center=(0.5, 0.5))  # entirely inside the image
        _, owner = render(scene._replace(pieces=(thing,)), 128, 128)
        assert owner.sum() == pytest.approx(abs(np.linalg.det(thing.matrix)) * 128**2, rel=0.04)


def test_mask_is_where_the_object_shows():
    """Painting the object black, then white changes a pixel by 255 times the object's visible share."""
    scenes = Scenes("train", image_size=96)
    for index in range(24):
        scene = scenes.scene(index)._replace(noise=0.0, light=(0.0, 0.0))
        thing, rendered = object_of(scene), []
        for value in (0, 1):
            painted = thing._replace(pattern=thing.pattern._replace(colors=np.full((2, 3, 1, 1), value, np.float32)))
            pieces = tuple(painted if piece is thing else piece for piece in scene.pieces)
            rendered.append(render(scene._replace(pieces=pieces), 96, 96)[0][:, :, 0].astype(int))
        shows = (rendered[1] - rendered[0]) / 255
        mask, occluded = scenes.mask(index), scene.pieces[-1] is not thing
        # Where the edges of object and occluder meet in one pixel, its owner may show in less than half of it.
        assert (mask != (shows >= 0.5)).sum() <= (4 if occluded else 0)
        assert (shows[mask] > 0.2).all() and 0.05 < mask.mean() < 0.45


def test_the_object_alone_changes_the_image():
    scenes = Scenes("train")
    for index in range(12):
        scene = scenes.scene(index)
        thing, touched = object_of(scene), np.zeros((64, 64), bool)
        image, owner = render(scene, 64, 64)
        without, nobody = render(scene._replace(pieces=tuple(p for p in scene.pieces if p is not thing)), 64, 64)
        window, share = coverage(thing.outline, 64 * thing.matrix, 64 * np.array(thing.center), 64, 64)
        touched[window] = share > 0
        changed = (image != without).any(-1)
        assert not changed[~touched].any() and not nobody.any()
        assert changed[owner == 1].mean() > 0.95


def test_class_is_not_in_color_place_or_area():
    """Nearest centroid and a linear classifier on these factors stay at chance (1/12), within 4 standard deviations."""

    def factors(split, count):
        scenes = Scenes(split, size=count)
        rows = []
        for index in range(count):
            image, owner = render(scenes.scene(index), 32, 32)
            mask = owner == 1
            y, x = np.nonzero(mask)
            colors = image.mean((0, 1)), image[mask].mean(0), image[~mask].mean(0)
            rows.append([*np.concatenate(colors), x.mean(), y.mean(), mask.sum(), 1])
        return np.array(rows), np.array([scenes.label(i) for i in range(count)])

    (train, train_labels), (test, labels) = factors("train", 720), factors("test", 720)
    deviation = train.std(0)
    deviation[-1] = 1
    train, test = train / deviation, test / deviation
    centroids = np.stack([train[train_labels == k].mean(0) for k in range(12)])
    nearest = ((test[:, None] - centroids) ** 2).sum(-1).argmin(1)
    linear = (test @ np.linalg.lstsq(train, np.eye(12)[train_labels], rcond=None)[0]).argmax(1)
    bound = 1 / 12 + 4 * math.sqrt(1 / 12 * 11 / 12 / 720)
    assert (nearest == labels).mean() < bound
    assert (linear == labels).mean() < bound


@pytest.mark.parametrize("size", [(33, 65), (96, 40), 8, 224])
def test_any_size_shows_the_same_scene(size):
    scenes, large = Scenes("train", image_size=size), Scenes("train", image_size=256)
    height, width = (size, size) if isinstance(size, int) else size
    example, mask = scenes[2], scenes.mask(2)
    assert example.image.shape == (height, width, 3) and mask.shape == (height, width)
    assert example.label == large.label(2)
    if height == width:
        assert mask.mean() == pytest.approx(large.mask(2).mean(), abs=0.06)
        np.testing.assert_allclose(example.image.mean((0, 1)), large[2].image.mean((0, 1)), atol=8)


def test_clips_move_and_turn_and_masks_follow():
    scenes = Scenes("val")
    for index in range(6):
        images, masks = scenes.clip(index, frames=8, objects=1)
        assert images.shape == (8, 64, 64, 3) and images.dtype == np.uint8
        assert masks.shape == (8, 64, 64) and masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
        places = np.array([np.mean(np.nonzero(mask), 1) for mask in masks])
        steps = np.hypot(*np.diff(places, axis=0).T)
        assert 0.5 < np.median(steps) < 4  # pixels per frame, of 64
        shift = np.rint(places[0] - places[7]).astype(int)
        moved_back = np.roll(masks[7], shift, (0, 1))
        overlap = (moved_back & masks[0]).sum() / (moved_back | masks[0]).sum()
        assert overlap < 0.95  # it also rotates
        change = np.abs(images[0].astype(float) - images[7]).mean(-1)
        assert change[masks[0] != masks[7]].mean() > 2 * change[(masks[0] | masks[7]) == 0].mean()


def test_clips_have_several_objects_that_occlude():
    scenes, hidden = Scenes("val"), 0
    for index in range(8):
        _, masks = scenes.clip(index, frames=12, objects=3)
        areas = np.stack([(masks == k).sum((1, 2)) for k in range(4)], 1)  # [T, 4]
        assert (areas[0] > 20).all()  # every object is visible in the first frame
        hidden += int((areas[:, 1:].min(0) < 0.7 * areas[:, 1:].max(0)).sum())
    assert hidden > 2
    longer, _ = scenes.clip(0, frames=5, objects=3)
    np.testing.assert_array_equal(longer[:2], scenes.clip(0, frames=2, objects=3)[0])


def test_bad_input():
    scenes = Scenes("train", size=10)
    for index in (10, -1):
        for read in (scenes.__getitem__, scenes.mask, scenes.clip, scenes.label):
            with pytest.raises(IndexError, match="outside"):
                read(index)
    for arguments in (
        {"size": 0},
        {"size": 1.5},
        {"image_size": 4},
        {"image_size": (8, 8, 8)},
        {"split": ""},
        {"seed": "x"},
    ):
        with pytest.raises(UserError, match=f"scenes: {next(iter(arguments))}"):
            Scenes(**arguments)
    for arguments in ({"frames": 0}, {"objects": 0}, {"objects": 256}):
        with pytest.raises(UserError, match="scenes"):
            scenes.clip(0, **arguments)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:trian", "scenes:trian: no such split, only train, val, test; did you mean 'train'?"),
        ("scenes:train?size=0", "size must be at least 1"),
        ("scenes:train?size=-5", "size must be a whole number"),
        ("scenes:train?size=99999999999", "size must be at most 2147483647"),
        ("scenes:train?size=" + "9" * 5000, "size must be a whole number"),
        ("scenes:train?image_size=1000000", "image_size must be at most 4096"),
        ("scenes:train?seed=abc", "seed must be a whole number"),
        ("scenes:train?colour=1", "unknown option 'colour'"),
    ],
)
def test_specs_that_name_nothing_are_refused(spec, message):
    with pytest.raises(UserError) as caught:
        open_source(spec)
    assert message in str(caught.value)
