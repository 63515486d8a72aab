"""Meshes, and the collectives of the compiled step under each kind of sharding."""

from __future__ import annotations

import re

import jax
import pytest

from dino_jax.errors import UserError
from dino_jax.parallel import sharding
from dino_jax.tools.plan import compiler
from dino_jax.tools.plan.hlo import collectives
from tests.tiny import tiny_config


def compiled(config, devices: int, **sizes):
    """The compiled step over the first devices, and the state's shapes and shardings."""
    config.run.mesh.update({"data": -1, **sizes})
    _, state, lowered = compiler.abstract_step(config, jax.devices()[:devices], 4)
    return compiler.compile_step(lowered), state


@pytest.fixture(scope="module")
def data_parallel():
    return compiled(tiny_config(), 4)


def test_data_parallel_reduces_gradients_center_and_metrics_once(data_parallel):
    program, state = data_parallel
    found = collectives(program.text)
    assert set(found) == {"all-reduce"}
    exact = compiler.whole_bytes(state.student["params"]) + 2 * 4 * tiny_config().head.out_dim  # two vectors [K]
    assert exact <= found["all-reduce"]["bytes"] <= 1.01 * exact


@pytest.mark.extra
def test_microbatches_reduce_as_often_as_one_batch(data_parallel):
    config = tiny_config()
    config.run.accum_steps = 4
    program, _ = compiled(config, 4)
    assert collectives(program.text, 4) == collectives(data_parallel[0].text)


def test_fsdp_gathers_parameters_and_scatters_gradients():
    """Each large array is held in four parts: gathered for student and teacher, its gradient reduced into parts."""
    config = tiny_config()
    program, state = compiled(config, 4, fsdp=4)
    student = jax.tree.leaves(state.student["params"])
    large = sum(x.size * 4 for x in student if not x.sharding.is_fully_replicated)
    assert large == sum(x.size * 4 for x in student if x.size >= 2**12) > 0
    places = [[x.sharding for x in jax.tree.leaves(part)] for part in (state.student["params"], state.ema)]
    assert places[0] == places[1]
    assert 4 * compiler.shard_bytes(state.opt_state) < compiler.whole_bytes(state.opt_state) * 2.6
    found = collectives(program.text)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-gather"]["bytes"] == 2 * large
    assert found["reduce-scatter"]["bytes"] == large
    small = compiler.whole_bytes(state.student["params"]) - large + 2 * 4 * config.head.out_dim
    assert small <= found["all-reduce"]["bytes"] <= 1.02 * small


def test_no_device_holds_262144_prototypes():
    """Eight devices with an eighth of the prototypes each: no array of the program is as long, none is gathered."""
    config = tiny_config()
    config.head.out_dim = 262_144
    program, state = compiled(config, 8, model=8)
    arrays = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.text)
    assert not [dims for dims in arrays if "262144" in dims.split(",")]
    assert "32768" in ",".join(arrays)
    found = collectives(program.text)
    assert set(found) == {"all-reduce"}
    logits = 4 * config.batch_size * 4 * config.head.out_dim  # of all crops, float32
    assert found["all-reduce"]["bytes"] < 0.1 * logits
    center = state.objectives["dino"]["center"]
    assert center.sharding.shard_shape(center.shape) == (32_768,)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, {"data": 8, "fsdp": 1, "model": 1}),
        ({"fsdp": 4}, {"data": 2, "fsdp": 4, "model": 1}),
        ({"data": 1, "fsdp": -1, "model": 2}, {"data": 1, "fsdp": 4, "model": 2}),
        ({"data": 2}, {"data": 2, "fsdp": 1, "model": 1}),
    ],
)
def test_mesh_sizes(sizes, shape):
    assert dict(sharding.make_mesh({"data": -1, "fsdp": 1, "model": 1, **sizes}).shape) == shape


def test_meshes_and_batches_that_do_not_fit():
    with pytest.raises(UserError, match=r"run\.mesh=.*does not fit 8 device"):
        sharding.make_mesh({"data": -1, "fsdp": 3, "model": 1})
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "model": 1})
    with pytest.raises(UserError, match=r"batch_size=24 .* use a multiple of 16"):
        sharding.check_batch(24, mesh, 2)


def test_a_constraint_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x
