"""The network over crops: order of crops, batch statistics and drop-path factors; parameter names."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.config import default
from dino_jax.models import Head, Network, ViT, build_network


def tiny_config():
    config = default()
    config.model.update({"name": "vit_tiny", "patch_size": 8, "embed_dim": 24, "depth": 1, "heads": 3})
    config.head.update({"out_dim": 10, "hidden_dim": 16, "bottleneck_dim": 8, "use_bn": True})
    config.crops.update({"global_size": (32, 32), "local_size": (16, 16)})
    return config


def crops_of(batch: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(1))
    return [jax.random.normal(keys[0], (batch, 2, 32, 32, 3)), jax.random.normal(keys[1], (batch, 3, 16, 16, 3))]


def test_every_crop_is_its_own_forward_pass():
    network, crops = build_network(tiny_config()), crops_of(4)
    variables = jax.jit(network.init)(jax.random.key(0), crops)
    assert sorted(variables["params"]) == ["backbone", "head"] == sorted([*variables["batch_stats"], "backbone"])
    keep = jax.random.bernoulli(jax.random.key(2), 0.5, (1, 2, 4, 5)) * 2.0
    outputs = jax.jit(network.apply)(variables, crops, keep)
    cls, logits = outputs.cls, outputs.logits
    assert cls.shape == (4, 5, 24) and logits.shape == (4, 5, 10)

    backbone, head = jax.jit(network.backbone.apply), jax.jit(network.head.apply)
    parts = [{k: v[part] for k, v in variables.items() if part in v} for part in ("backbone", "head")]
    for crop in range(5):
        images = crops[0][:, crop] if crop < 2 else crops[1][:, crop - 2]
        features = backbone(parts[0], images, keep[..., crop])
        np.testing.assert_allclose(cls[:, crop], features, atol=1e-5)
        np.testing.assert_allclose(logits[:, crop], head(parts[1], features), atol=1e-5)


def test_head_statistics_are_taken_over_all_crops():
    network, crops = build_network(tiny_config()), crops_of(4)
    variables = jax.jit(network.init)(jax.random.key(0), crops)
    _, moved = jax.jit(partial(network.apply, train=True, mutable=["batch_stats"]))(variables, crops)
    backbone = {"params": variables["params"]["backbone"]}
    run = jax.jit(network.backbone.apply)
    features = [run(backbone, x.reshape(-1, *x.shape[2:])) for x in crops]
    first = variables["params"]["head"]["mlp_0"]
    hidden = np.concatenate(features) @ first["kernel"] + first["bias"]
    np.testing.assert_allclose(moved["batch_stats"]["head"]["mlp_1"]["mean"], 0.1 * hidden.mean(0), atol=1e-6)


def test_globals_alone_pass_as_the_teacher_sees_them():
    network, crops = Network(ViT(24, 1, 3, 8, (32, 32)), Head(10, 16, 8)), crops_of(2)
    variables = jax.jit(network.init)(jax.random.key(0), crops)
    run = jax.jit(network.apply)
    np.testing.assert_allclose(run(variables, crops[:1]).logits, run(variables, crops).logits[:, :2], rtol=0, atol=1e-6)
    assert "batch_stats" not in variables


def test_double_precision_stays_double(x64):
    network = Network(ViT(24, 1, 3, 8, (32, 32), dtype=jnp.float64), Head(10, 16, 8, dtype=jnp.float64))
    crops = [jnp.ones((1, 2, 32, 32, 3)), jnp.ones((1, 1, 16, 16, 3))]
    shapes = jax.eval_shape(network.init, jax.random.key(0), crops)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), shapes)
    program, out = jax.make_jaxpr(network.apply, return_shape=True)(variables, crops)
    assert out.logits.dtype == out.cls.dtype == jnp.float64
    assert "f32" not in str(program)
