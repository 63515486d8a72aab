"""Masks: how many, where and how rough, against draws of the official codes; and that their buffer always suffices."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dino_jax.data.masking import Masking, blocks, draw, slots
from dino_jax.data.pipeline import make_dataset
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from tests.models.torch_names import section
from tests.tiny import tiny_config

DRAWS = 600


def spread(side: int, group: int = 20, microbatches: int = 1) -> Masking:
    return Masking((side, side), 0.5, (0.1, 0.5), "block", True, group, microbatches, 0)


def boundary(mask: np.ndarray) -> int:
    """Pairs of neighbors of which one is masked."""
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def close(values, mean: float, deviation: float, draws: int = 2000) -> None:
    """Within four standard errors of a mean of `draws` draws."""
    error = deviation * math.sqrt(1 / len(values) + 1 / draws)
    assert abs(np.mean(values) - mean) <= 4 * error, (np.mean(values), mean, error)


@pytest.mark.parametrize("case", ["224_patch14", "224_patch16"])
def test_dinov2(load_reference, case):
    held = section(load_reference("family/masking.npz"), f"dinov2/{case}/")
    said = json.loads(str(held["config"]))
    side = said["image"] // said["patch"]
    masking = spread(side, said["crops_per_batch"] // 2)
    assert masking.capacity(masking.group) == held["upperbound"]
    masks, totals = [], []
    for step in range(DRAWS // masking.group):
        places = slots(masking, np.arange(masking.group), (0, step))
        rng = np.random.default_rng(step)
        drawn = [draw(masking, rng, int(slot)) for slot in places.ravel()]
        assert sum(mask.any() for mask in drawn) == held["masked_images_per_batch"]
        totals.append(sum(mask.sum() for mask in drawn))
        masks += [mask.reshape(side, side) for mask in drawn if mask.any()]
    close([mask.sum() for mask in masks], held["count_mean"], held["count_std"])
    close([boundary(mask) for mask in masks], held["boundary_mean"], held["boundary_std"])
    close(totals, held["masked_tokens_per_batch_mean"], held["masked_tokens_per_batch_std"], 100)
    where, expected = np.mean(masks, axis=0), held["position_mean"]
    errors = np.sqrt(expected * (1 - expected) * (1 / len(masks) + 1 / 2000))
    assert (np.abs(where - expected) / errors).max() < 5  # the worst of 256 places


@pytest.mark.parametrize("asked", [1, 10, 64, 128])
def test_dinov2_blocks(load_reference, asked):
    held = section(load_reference("family/masking.npz"), f"generator/224_patch14/{asked}/")
    rng = np.random.default_rng(asked)
    masks = [blocks(rng, (16, 16), asked, 4, 128) for _ in range(DRAWS)]
    counts = [mask.sum() for mask in masks]
    assert max(counts) <= asked
    close(counts, held["count_mean"], held["count_std"])
    close([boundary(mask) for mask in masks], held["boundary_mean"], held["boundary_std"])


@pytest.mark.parametrize(("case", "shape"), [("block", "large_block"), ("rand", "random")])
def test_ibot(load_reference, case, shape):
    held = section(load_reference("family/masking.npz"), f"ibot/{case}/")
    side = json.loads(str(held["config"]))["side"]
    masking = Masking((side, side), 0.5, (0.1, 0.5), shape, False, 1, 1, 0)
    rng = np.random.default_rng(1)
    masks = [draw(masking, rng, 0).reshape(side, side) for _ in range(2 * DRAWS)]
    close([not mask.any() for mask in masks], held["fraction_empty"], 0.5)
    close([mask.sum() for mask in masks], held["count_mean"], held["count_std"])
    close([boundary(mask) for mask in masks], held["boundary_mean"], held["boundary_std"])
    assert max(mask.sum() for mask in masks) <= masking.capacity(1) // 2


def test_a_group_belongs_to_one_device_and_microbatch():
    """Each has the same number of masked crops, so a buffer of a known size holds them."""
    masking = spread(4, group=2, microbatches=2)
    places = slots(masking, np.arange(16), (3,))
    has_mask = places < 2  # two of the four crops of a group
    for device in np.split(has_mask, 4):  # four rows each
        for microbatch in (device[0::2], device[1::2]):  # as the step deals them
            assert microbatch.sum() == 2
    assert (places != slots(masking, np.arange(16), (4,))).any()
    np.testing.assert_array_equal(places[4:12], slots(masking, np.arange(4, 12), (3,)))  # any part of the batch


def test_images_that_are_not_whole_groups_are_refused():
    with pytest.raises(UserError, match=r"objective\.ibot\.group=20: 30 images .* set it to a divisor of 30"):
        spread(4).capacity(30)


@pytest.fixture
def config():
    config = tiny_config(masking=True)
    config.objective.ibot.update({"weight": 1.0, "group": 4})
    return config


def first(config, count=1, **options):
    batches = make_dataset(open_source(config.data.train), config, **options)
    found = [next(batches)["masked"] for _ in range(count)]
    batches.close()
    return found


def test_the_pipeline_draws_them_by_seed_and_step_alone(config):
    one, two = first(config, 2)
    assert one.shape == (16, 2, 16) and one.dtype == bool
    assert one.any() and (one != two).any()
    np.testing.assert_array_equal(first(config, position=16)[0], two)
    np.testing.assert_array_equal(first(config, batch_slice=slice(8, 16))[0], one[8:])
    config.data.render = "device"
    np.testing.assert_array_equal(first(config)[0], one)
    config.seed = 1
    assert (first(config)[0] != one).any()


def test_early_epochs_can_be_without(config):
    config.objective.ibot.start_epoch = 1
    batches = first(config, 5)  # four steps an epoch
    assert not any(masked.any() for masked in batches[:4])
    assert batches[4].any()
