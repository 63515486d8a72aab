"""Layers that several backbones share."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from ml_collections import ConfigDict
from scipy.special import ndtr

from dino_jax import models
from dino_jax.errors import UserError
from dino_jax.models.attention import fused_attention
from dino_jax.models.layers import gelu, linear_map
from dino_jax.parallel import sharding
from dino_jax.training.step import jit_init_state, jit_train_step, make_recipe
from tests.tiny import random_crops, tiny_config

GPU = jax.default_backend() == "gpu"


def test_gelu_and_its_slope_are_the_closed_form():
    x = np.linspace(-6, 6, 241)
    with jax.enable_x64(True):
        value, slope = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(x))
    np.testing.assert_allclose(value, x * ndtr(x), atol=1e-14)
    np.testing.assert_allclose(slope, ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), atol=1e-14)


def test_gelu_of_bfloat16_is_rounded_once():
    x = jnp.linspace(-4, 4, 1000).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) * ndtr(np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(gelu(x), np.float64), exact, rtol=2**-8, atol=1e-6)


def test_gelu_keeps_only_its_input_for_the_backward_pass():
    _, backward = jax.vjp(gelu, jnp.zeros((4, 8), jnp.bfloat16))
    kept = jax.tree.leaves(backward)
    assert [(x.shape, x.dtype) for x in kept] == [((4, 8), jnp.bfloat16)]


def test_the_linear_map_has_the_gradients_of_a_matrix_product():
    rng = np.random.default_rng(0)
    x, kernel, out = rng.normal(size=(2, 5, 3)), rng.normal(size=(3, 4)), rng.normal(size=(2, 5, 4))
    with jax.enable_x64(True):
        value, backward = jax.vjp(linear_map, jnp.asarray(x), jnp.asarray(kernel))
        to_x, to_kernel = backward(jnp.asarray(out))
    np.testing.assert_allclose(value, x @ kernel, atol=1e-14)
    np.testing.assert_allclose(to_x, out @ kernel.T, atol=1e-14)
    np.testing.assert_allclose(to_kernel, np.einsum("bnd,bne->de", x, out), atol=1e-14)


@pytest.mark.parametrize(("platform", "summed"), [("cpu", "[0] x [0]"), ("tpu", "[0, 1] x [0, 1]")])
def test_the_kernels_gradient_suits_the_platform_that_is_compiled_for(platform, summed):
    gradient = jax.jit(jax.grad(lambda kernel, x: linear_map(x, kernel).sum()))
    text = gradient.trace(jnp.ones((3, 4)), jnp.ones((2, 5, 3))).lower(lowering_platforms=(platform,)).as_text()
    assert f"contracting_dims = {summed}" in text


def test_fused_attention_where_it_cannot_be_is_one_line():
    config = tiny_config()
    config.run.attention = "fused"  # in float32
    with pytest.raises(UserError, match=r"run.attention=fused needs an NVIDIA GPU .*: set it to auto"):
        models.build_network(config)


@pytest.mark.skipif(GPU, reason="for machines without a GPU")
def test_attention_is_plain_without_a_gpu():
    config = tiny_config()
    config.model.dtype = "bfloat16"
    assert not models.build_network(config).backbone.fused


def attention(query, key, value):
    """Attention of [B, N, H, D/H] in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest") * query.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), value, precision="highest")


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [37, 50, 197])
def test_cudnn_attention_and_gradients_are_those_of_float32_up_to_rounding(tokens):
    draws = jax.random.normal(jax.random.key(0), (4, 8, tokens, 6, 64), jnp.bfloat16)
    out, backward = jax.vjp(fused_attention, *draws[:3])
    wanted, backward_wanted = jax.vjp(attention, *draws[:3])
    pairs = [(out, wanted), *zip(backward(draws[3]), backward_wanted(draws[3].astype(jnp.float32)), strict=True)]
    for found, exact in pairs:
        error = jnp.linalg.norm((found - exact).astype(jnp.float32)) / jnp.linalg.norm(exact.astype(jnp.float32))
        assert error < 5e-3


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces cuDNN's two kernels by plain operations on the CPU."""
    kernels = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(models, "can_fuse_attention", lambda dtype, head_width: True)

    def attend(query, key, value, lengths, scale):
        logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
        if lengths.size:
            there = jnp.arange(key.shape[1]) < lengths.reshape(-1, 1, 1, 1)
            logits = jnp.where(there, logits, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits).astype(query.dtype), value)

    def forward(query, key, value, bias, query_lengths, lengths, *rest, scale, is_training, **options):
        statistics = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
        return (attend(query, key, value, lengths, scale), statistics)[: 1 + is_training]

    def backward(query, key, value, bias, query_lengths, lengths, *rest, scale, **options):
        return jax.vjp(lambda q, k, v: attend(q, k, v, lengths, scale), query, key, value)[1](rest[-1])

    for primitive, kernel in (
        (kernels._dot_product_attention_fwd_p, forward),
        (kernels._dot_product_attention_bwd_p, backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(kernel, multiple_results=True), platform="cpu")


@pytest.mark.skipif(GPU, reason="for machines without a GPU")
def test_a_step_with_fused_attention_over_a_mesh_is_the_plain_one(stand_in):
    config = tiny_config()
    config.model.dtype = "bfloat16"
    crops = random_crops(config, dtype=jnp.bfloat16)
    norms = []
    for mode, devices in (("plain", 4), ("auto", 1), ("auto", 4)):
        config.run.attention = mode
        mesh = sharding.make_mesh(ConfigDict({"data": devices, "fsdp": 1, "model": 1}), jax.devices()[:devices])
        recipe = make_recipe(config, 10)
        assert recipe.network.backbone.fused == (mode == "auto")
        step = jit_train_step(recipe, mesh)
        _, metrics = step(jit_init_state(recipe, mesh), sharding.to_devices(crops, mesh, config.batch_size))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-2)
