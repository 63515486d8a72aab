"""The contract of the backbones, and register tokens from the configuration to every use of a trained model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.eval import run as evaluation
from dino_jax.eval.features import ClsAttention, Patches, run
from dino_jax.inference.model import Model, load
from dino_jax.models import BACKBONES, ViT, build_backbone
from dino_jax.tools.plan.flops import step_flops
from dino_jax.training.loop import train
from dino_jax.training.start import start_from
from dino_jax.training.step import init_state, make_recipe
from dino_jax.weights import architecture
from tests.tiny import tiny_config


def tiny(**options) -> ViT:
    return ViT(**{"embed_dim": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": (32, 16)} | options)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 32, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(tiny(registers=3).init)(jax.random.key(0), images)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_answers_the_contract(name):
    """Shapes of tokens and attention fit each other and what is declared, on an input that is not square."""
    config = default().model
    config.name, options = name, {"train": False}
    model = build_backbone(config, 64)
    images = jnp.zeros((2, 64, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    feature = jax.eval_shape(lambda v: model.apply(v, images, **options), variables)
    assert feature.shape == (2, model.embed_dim)
    assert set(model.linear_features) <= {"1", "4", "1+avg"}
    if model.patch_size is None:
        for method in ("tokens", "attention"):
            with pytest.raises(UserError, match=f"a ResNet has no {method}"):
                jax.eval_shape(lambda v, method=method: model.apply(v, images, method=method), variables)
        return
    tokens, attention = (
        jax.eval_shape(lambda v, method=method: model.apply(v, images, method=method), variables)
        for method in ("tokens", "cls_attention")
    )
    wanted = [(1, 2, model.embed_dim), (1, 2, model.registers, model.embed_dim), (1, 2, 4, 2, model.embed_dim)]
    assert [x.shape for x in tokens] == wanted
    assert attention.shape == (2, model.heads, 4, 2)


def test_registers_lie_between_cls_and_patches_and_have_no_position(variables, images):
    model, params = tiny(registers=3), variables["params"]
    tokens = model.apply(variables, images, 2, method="tokens")
    assert [x.shape for x in tokens] == [(2, 4, 32), (2, 4, 3, 32), (2, 4, 4, 2, 32)]
    np.testing.assert_allclose(model.apply(variables, images), tokens.cls[-1], atol=1e-6)
    keep = jnp.zeros((2, 2, 4))  # no branch is kept: CLS is its own embedding, whatever the registers hold
    cls = params["cls_token"][0, 0] + params["pos_embed"][0, 0]
    expected = (cls - cls.mean()) / jnp.sqrt(cls.var() + 1e-6)
    np.testing.assert_allclose(model.apply(variables, images, keep)[0], expected, atol=1e-5)
    silent = {"params": params | {"pos_embed": jnp.zeros_like(params["pos_embed"])}}
    swapped = {"params": silent["params"] | {"register_tokens": params["register_tokens"][:, ::-1]}}
    first, second = (model.apply(v, images, method="tokens") for v in (silent, swapped))
    np.testing.assert_allclose(first.registers[..., ::-1, :], second.registers, atol=1e-5)  # their order is nothing
    np.testing.assert_allclose(first.patches, second.patches, atol=1e-5)


def test_attention_leaves_the_registers_out(variables, images):
    model = tiny(registers=3)
    whole = model.apply(variables, images, method="attention")
    assert whole.shape == (4, 2, 12, 12)
    shown = model.apply(variables, images, method="cls_attention")
    np.testing.assert_array_equal(shown, whole[:, :, 0, 4:].reshape(4, 2, 4, 2))


def test_without_registers_nothing_is_new(variables, images):
    plain = jax.jit(tiny().init)(jax.random.key(0), images)
    assert "register_tokens" not in plain["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(variables) - count(plain) == 3 * 32
    for name, leaf in plain["params"].items():  # the others are drawn as without them
        jax.tree.map(np.testing.assert_array_equal, leaf, variables["params"][name])
    program = jax.jit(tiny().apply).lower(plain, images).as_text()
    assert program == jax.jit(tiny(registers=0).apply).lower(plain, images).as_text()


def test_the_key_is_for_vits_alone():
    config = default().model
    config.registers = 4
    assert build_backbone(config, 224).registers == 4
    for name in ("resnet50", "xcit_small_12"):
        config.name = name
        with pytest.raises(UserError, match=f"model.registers does not apply to {name}"):
            build_backbone(config, 224)


def test_flops_count_the_registers():
    plain, four = default(), default()
    four.model.registers = 4
    assert 1.01 < step_flops(four, 1) / step_flops(plain, 1) < 1.06  # 4 more of 197 and of 37 tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of two steps with four registers."""
    workdir = tmp_path_factory.mktemp("registers")
    config = tiny_config(registers=4)
    config.epochs, config.batch_size = 1, 32
    train(config, workdir)
    return workdir


def test_registers_are_trained_and_found_in_the_checkpoint(trained):
    model = load(trained)
    assert model.backbone.registers == 4
    start = init_state(make_recipe(model.config, 2), jax.random.key(model.config.seed)).student["params"]["backbone"]
    assert model.variables["params"]["register_tokens"].shape == (1, 4, 32)
    assert np.abs(model.variables["params"]["register_tokens"] - start["register_tokens"]).max() > 0


def test_a_trained_model_shows_patches_alone(trained):
    model = load(trained)
    batch = {"image": np.random.default_rng(0).integers(256, size=(2, 40, 24, 3), dtype=np.uint8)}
    (attention, _), *_ = run(model, ClsAttention(), [batch])
    (patches, _), *_ = run(model, Patches(), [batch])
    assert attention.shape == (2, 2, 5, 3) and patches.shape == (2, 5, 3, 32)
    assert np.all(attention.sum((2, 3)) < 1)


def test_images_of_any_size_with_registers(trained):
    model = load(trained)
    model = Model(model.config, model.variables, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in ((32, 32), (16, 40), (40, 24))]
    cls, patches = model.features(images, patches=True)
    for i, image in enumerate(images):
        alone = model.backbone.apply(model.variables, image[None], method="tokens")
        np.testing.assert_allclose(cls[i], alone.cls[0, 0], atol=1e-5)
        np.testing.assert_allclose(patches[i], alone.patches[0, 0], atol=1e-5)


def test_protocols_take_a_model_with_registers(trained):
    from dino_jax.eval.protocols import knn

    config = knn.PROTOCOL.default_config()
    config.update({"resize": 0, "crop": 32, "batch_size": 8, "k": (3,), "workers": 0})
    figures = knn.evaluate(load(trained), "scenes:train?size=24&image_size=32,scenes:val?size=12&image_size=32", config)
    assert 0 <= figures["top1_k3"] <= figures["top5_k3"] <= 100


@pytest.mark.extra
def test_every_protocol_that_scenes_allow_takes_registers(trained):
    overrides = [
        f"--config.{n}.{k}" for n in ("knn", "linear", "lowshot") for k in ("resize=0", "crop=32", "batch_size=8")
    ]
    overrides += ["--config.linear.epochs=1", "--config.dense.epochs=1"]
    overrides += ["--config.voc.size=32", "--config.dense.size=32", "--config.vos.size=64"]
    data = "scenes:train?size=36&image_size=32,scenes:val?size=12&image_size=64"
    figures = evaluation.evaluate("all", str(trained), data, overrides=overrides)
    assert {"knn", "linear", "voc", "vos", "dense"} <= {name.partition("/")[0] for name in figures}


def test_a_run_that_needs_registers_is_told_where_to_set_them(trained):
    config = tiny_config()
    config.init_from = str(trained)
    recipe = make_recipe(config, steps_per_epoch=1)
    state = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    with pytest.raises(UserError, match=r"register_tokens is unknown here.*model\.registers=4"):
        start_from(state, config)


def test_registered_shapes_tell_the_registers():
    config = default()
    config.model.registers = 4
    shapes = architecture.backbone_shapes(config)["params"]
    assert shapes["register_tokens"].shape == (1, 4, 384)
