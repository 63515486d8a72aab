"""ResNet: stems, strides, and batch statistics over resolutions and devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dino_jax.errors import UserError
from dino_jax.models import Head, Network, ResNet

tiny = partial(ResNet, stages=(1,), bottleneck=False, small_stem=True)


def sizes_of(model: ResNet, side: int) -> list[int]:
    """Side of the output of every convolution, in order of execution."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    jaxpr = jax.make_jaxpr(model.apply)(variables, images)
    return [eqn.outvars[0].aval.shape[1] for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]


def test_strides_are_where_torchvision_has_them():
    model = ResNet((1, 1, 1, 1), bottleneck=True)
    stages = ([56, 56, 56, 56], [56, 28, 28, 28], [28, 14, 14, 14], [14, 7, 7, 7])  # 1 x 1, 3 x 3, 1 x 1, shortcut
    assert sizes_of(model, 224) == [112, *(side for stage in stages for side in stage)]
    assert sizes_of(ResNet((1, 1), bottleneck=False, small_stem=True), 32) == [32, 32, 32, 16, 16, 16]


def test_statistics_move_by_resolution_globals_first():
    network = Network(tiny(), Head(8, 16, 8))
    keys = jax.random.split(jax.random.key(0), 2)
    crops = [jax.random.normal(keys[0], (3, 2, 16, 16, 3)), 2 + jax.random.normal(keys[1], (3, 4, 8, 8, 3))]
    variables = jax.jit(network.init)(jax.random.key(1), crops)
    run = jax.jit(partial(network.apply, train=True, mutable=["batch_stats"]))
    outputs, moved = run(variables, crops)
    mean = np.zeros(64)
    for images in crops:
        kernel = variables["params"]["backbone"]["conv1"]["kernel"]
        flat = images.reshape(-1, *images.shape[2:])
        out = jax.lax.conv_general_dilated(flat, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        mean = 0.9 * mean + 0.1 * np.asarray(out).mean((0, 1, 2))
    np.testing.assert_allclose(moved["batch_stats"]["backbone"]["bn1"]["mean"], mean, atol=1e-6)
    assert outputs.logits.shape == (3, 6, 8)


def test_four_devices_equal_one_statistics_included():
    network = Network(tiny(), Head(8, 16, 8, use_bn=True))
    keys = jax.random.split(jax.random.key(0), 2)
    crops = [jax.random.normal(keys[0], (8, 2, 16, 16, 3)), jax.random.normal(keys[1], (8, 2, 8, 8, 3))]
    variables = jax.jit(network.init)(jax.random.key(1), crops)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    @jax.jit
    def run(params, stats, crops):
        def loss(params):
            state = {"params": params, "batch_stats": stats}
            outputs, moved = network.apply(state, crops, train=True, mutable=["batch_stats"])
            logits = outputs.logits
            return jnp.mean(logits[:, 0] ** 2), (logits, moved["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    one = run(variables["params"], variables["batch_stats"], crops)
    state = jax.device_put((variables["params"], variables["batch_stats"]), same)
    four = run(*state, jax.device_put(crops, split))
    assert len(four[1][0].sharding.device_set) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, four)


def test_remat_wraps_every_block_and_changes_no_name():
    images = jnp.zeros((4, 8, 8, 3))
    plain, remat = ResNet((2, 1), True), ResNet((2, 1), True, remat=True)
    variables, same = (jax.eval_shape(model.init, jax.random.key(0), images) for model in (plain, remat))
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    run = partial(remat.apply, train=True, mutable=["batch_stats"])
    program, (_, moved) = jax.make_jaxpr(run, return_shape=True)(variables, images)
    assert sum("remat" in eqn.primitive.name or "checkpoint" in eqn.primitive.name for eqn in program.eqns) == 3
    assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_no_tokens_and_no_attention_in_one_clear_line():
    images = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(tiny().init, jax.random.key(0), images)
    for method in ("tokens", "attention"):
        with pytest.raises(UserError, match=f"a ResNet has no {method}"):
            tiny().apply(variables, images, method=method)
