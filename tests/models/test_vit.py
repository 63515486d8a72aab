"""ViT: behavior at the edges, beyond the reference tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.models import ViT, resize_pos_embed


def test_position_resize_of_a_rectangular_table():
    table = jnp.arange(1 + 6 * 8, dtype=jnp.float32).reshape(1, -1, 1)
    assert resize_pos_embed(table, (6, 8), (6, 8)) is table
    constant = resize_pos_embed(jnp.ones((1, 1 + 6 * 8, 2)), (5, 11), (6, 8))
    np.testing.assert_allclose(constant, np.ones((1, 1 + 5 * 11, 2)), atol=1e-6)
    with pytest.raises(UserError, match="not a grid of 7 x 7"):
        resize_pos_embed(table, (6, 8))


def tiny(**options) -> ViT:
    return ViT(**{"embed_dim": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": (32, 16)} | options)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 32, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(tiny().init)(jax.random.key(0), images)


def test_init_std_is_that_of_the_blocks_alone(variables, images):
    """`init_std` replaces the official 0.02 in the blocks' kernels; embeddings keep 0.02."""
    other = tiny(init_std=0.15).init(jax.random.key(0), images)
    for params, std in ((variables["params"], 0.02), (other["params"], 0.15)):
        kernels = [x for x in jax.tree.leaves(params["blocks_1"]) if x.ndim == 2]
        assert len(kernels) == 4
        for x, expected in [*((kernel, std) for kernel in kernels), (params["pos_embed"], 0.02)]:
            assert abs(x.std() / expected - 1) < 4 / np.sqrt(2 * x.size)


def test_one_interface(variables, images):
    model = tiny()
    tokens = model.apply(variables, images, method="tokens")
    assert [x.shape for x in tokens] == [(1, 4, 32), (1, 4, 0, 32), (1, 4, 4, 2, 32)]
    np.testing.assert_allclose(model.apply(variables, images), tokens.cls[-1], atol=1e-6)
    first, last = (model.apply(variables, images, block, method="attention") for block in (0, -1))
    np.testing.assert_array_equal(first, model.apply(variables, images, -2, method="attention"))
    assert first.shape == (4, 2, 9, 9)
    assert not np.allclose(first, last)
    np.testing.assert_allclose(last.sum(-1), 1, atol=1e-5)
    shown = model.apply(variables, images, method="cls_attention")
    np.testing.assert_array_equal(shown, last[:, :, 0, 1:].reshape(4, 2, 4, 2))


def test_drop_path_zero_removes_a_branch_of_a_sample(variables, images):
    model = tiny()
    plain = model.apply(variables, images)
    keep = jnp.ones((2, 2, 4))
    np.testing.assert_array_equal(model.apply(variables, images, keep), plain)
    dropped = model.apply(variables, images, keep.at[:, :, 1].set(0))
    np.testing.assert_array_equal(np.delete(dropped, 1, axis=0), np.delete(plain, 1, axis=0))
    params = variables["params"]
    cls = params["cls_token"][0, 0] + params["pos_embed"][0, 0]  # every branch of sample 1 is off
    np.testing.assert_allclose(dropped[1], (cls - cls.mean()) / jnp.sqrt(cls.var() + 1e-6), atol=1e-5)


def test_drop_path_scales_what_it_keeps(variables, images):
    model = tiny(depth=1)
    scaled = jax.tree.map(lambda x: x, variables)
    proj = variables["params"]["blocks_0"]["attn"]["proj"]
    scaled["params"]["blocks_0"]["attn"]["proj"] = jax.tree.map(lambda x: 2 * x, proj)
    keep = jnp.ones((1, 2, 4)).at[0, 0].set(2.0)
    np.testing.assert_allclose(model.apply(variables, images, keep), model.apply(scaled, images), atol=1e-6)


def test_remat_changes_no_gradient_and_no_name(variables, images):
    def gradient(model):
        return jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, images) ** 3)))(variables)

    plain, remat = gradient(tiny()), gradient(tiny(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)
    assert "remat" in str(jax.make_jaxpr(lambda v: tiny(remat=True).apply(v, images))(variables))


def test_bfloat16_keeps_float32_parameters_and_softmax(variables, images):
    model = tiny(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = model.apply(variables, images)
    assert out.dtype == jnp.bfloat16
    assert model.apply(variables, images, method="attention").dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), tiny().apply(variables, images), atol=0.1)


def test_precision_reaches_every_product(variables, images):
    program = str(jax.make_jaxpr(lambda v: tiny(precision="highest").apply(v, images))(variables))
    products = program.count("dot_general[")
    assert products == program.count("precision=(Precision.HIGHEST") + program.count("precision=Precision.HIGHEST") > 12


def test_initialization_is_the_official_one():
    model = tiny(embed_dim=192, heads=3, depth=1, image_size=(64, 64))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    for weight in (params["cls_token"], params["pos_embed"], params["blocks_0"]["attn"]["qkv"]["kernel"]):
        assert abs(weight.std() / 0.02 - 1) < 4 / np.sqrt(2 * weight.size)  # four standard errors
    bound = (8 * 8 * 3) ** -0.5
    for weight in params["patch_embed"].values():
        assert abs(weight).max() < bound
        assert abs(weight.std() * 3**0.5 / bound - 1) < 4 * np.sqrt(0.2 / weight.size)
    for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
        outer, inner = layer.split("/")
        assert not params["blocks_0"][outer][inner]["bias"].any()


def test_bad_sizes_are_one_clear_line(variables, images):
    with pytest.raises(UserError, match=r"30 x 16 pixels .* patches of 8"):
        tiny().apply(variables, images[:, :30])
    with pytest.raises(UserError, match="in_chans"):
        tiny().apply(variables, images[..., :1])
    with pytest.raises(UserError, match="block 2"):
        tiny().apply(variables, images, 2, method="attention")
    with pytest.raises(UserError, match="last 3 blocks"):
        tiny().apply(variables, images, 3, method="tokens")
