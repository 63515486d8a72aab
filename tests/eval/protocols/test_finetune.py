from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dino_jax.config import default
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval.protocols import finetune
from dino_jax.inference.model import Model
from dino_jax.models import build_backbone
from dino_jax.parallel.sharding import make_mesh


def small(epochs=2):
    config = finetune.PROTOCOL.default_config()
    config.epochs, config.batch_size, config.lr, config.warmup_epochs = epochs, 8, 0.05, 1
    config.size, config.resize, config.crop, config.threads, config.repeats = 16, 16, 16, 2, 1
    config.ema = 0.5
    return config


def flat(tree):
    """Path -> leaf, such as `backbone/pos_embed`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def xcit():
    """An XCiT with two blocks and two class-attention blocks, width 16, patch 8."""
    config = default()
    config.model.update({"name": "xcit_small_12", "embed_dim": 16, "depth": 2, "heads": 2, "patch_size": 8})
    config.crops.global_size = (16, 16)
    backbone = build_backbone(config.model, config.crops.global_size)
    return Model(config, jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))


def test_protocol_trains_and_resumes_to_the_same_end(vit, class_folders, tmp_path, monkeypatch):
    config = small()
    config.mixup = config.cutmix = 0.0
    whole = finetune.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "whole"))
    assert set(whole) == {"top1", "top5", "top1_ema", "top5_ema", "top1_best"}
    train = finetune._train_epoch

    def stop(*args):
        if args[3] == 1:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(finetune, "_train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "part"))
    monkeypatch.setattr(finetune, "_train_epoch", train)
    assert finetune.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "part")) == whole
    # a finished run is tested again but not trained further
    assert finetune.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "part")) == whole
    config.lr = 0.1
    with pytest.raises(UserError, match="other settings"):
        finetune.evaluate(vit, str(class_folders), config, workdir=str(tmp_path / "part"))


def test_too_few_images_for_a_batch(vit, class_folders):
    config = small()
    config.batch_size = 100
    with pytest.raises(UserError, match="exceeds the 24"):
        finetune.evaluate(vit, str(class_folders), config)


def test_decay_and_layers(vit):
    params = {"backbone": vit.variables["params"], "head": {"kernel": np.zeros((16, 3)), "bias": np.zeros(3)}}
    mask = finetune.decayed(params)
    assert mask["head"] == {"kernel": True, "bias": False}
    assert not mask["backbone"]["pos_embed"] and not mask["backbone"]["cls_token"]
    assert mask["backbone"]["blocks_0"]["attn"]["qkv"] == {"kernel": True, "bias": False}
    layers = {
        "backbone/pos_embed": 0,
        "backbone/patch_embed/kernel": 0,
        "backbone/blocks_0/norm1/scale": 1,
        "backbone/blocks_1/mlp/fc1/bias": 2,
        "backbone/norm/scale": 3,
        "head/kernel": 3,
    }
    assert flat(finetune.layers_of(params)).items() >= layers.items()


def test_class_attention_blocks_are_layers_above_the_others(xcit):
    params = {"backbone": xcit.variables["params"], "head": {"kernel": np.zeros((16, 3)), "bias": np.zeros(3)}}
    found = flat(finetune.layers_of(params))
    layers = {
        "backbone/cls_token": 0,
        "backbone/patch_embed/proj_0_0/kernel": 0,
        "backbone/pos_embeder/token_projection/kernel": 0,
        "backbone/blocks_0/attn/qkv/kernel": 1,
        "backbone/blocks_1/gamma1": 2,
        "backbone/cls_attn_blocks_0/attn/qkv/kernel": 3,
        "backbone/cls_attn_blocks_1/mlp/fc1/kernel": 4,
        "backbone/norm/scale": 5,
        "head/bias": 5,
    }
    assert {name: found[name] for name in layers} == layers


def test_an_xcit_is_fine_tuned_with_the_default_drop_path(xcit, class_folders):
    config = small(1)
    config.layer_decay = 0.9
    assert config.drop_path == 0.1
    figures = finetune.evaluate(xcit, str(class_folders), config)
    assert all(0 <= value <= 100 for value in figures.values())
    factors = np.asarray(finetune.drop_path(jax.random.key(0), xcit.forward, 4000, config))
    assert factors.shape == (2, 3, 4000)  # attention, MLP and local branches
    error = 4 * np.sqrt(0.1 * 0.9 / 4000)  # four standard errors
    np.testing.assert_allclose((factors == 0).mean(-1), 0.1, atol=error)
    np.testing.assert_allclose(factors.mean(-1), 1, atol=error / 0.9)


def test_learning_rates_by_layer_and_schedule():
    config = small()
    config.layer_decay, config.weight_decay, config.epochs, config.warmup_epochs = 0.5, 0.0, 10, 2
    optimizer = finetune.make_optimizer(config, 5)
    params = {name: {"kernel": jnp.ones((2, 2))} for name in ("blocks_0", "blocks_1", "head")}
    state = optimizer.init(params)
    rates = []
    for _ in range(50):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        rates.append([-float(updates[name]["kernel"][0, 0]) for name in ("head", "blocks_0")])
    rates = np.array(rates)
    np.testing.assert_allclose(rates[:, 1], rates[:, 0] / 4, rtol=1e-4)
    peak = 0.05 * 8 / 512
    assert rates[0, 0] == pytest.approx(1e-6, rel=1e-3) and rates[10, 0] == pytest.approx(peak, rel=1e-3)
    assert np.all(np.diff(rates[:11, 0]) > 0) and np.all(np.diff(rates[10:, 0]) < 0)


def test_a_step_equals_the_formula(vit):
    config = small()
    config.erasing, config.drop_path, config.smoothing, config.ema = 0.0, 0.0, 0.0, 0.75
    optimizer = optax.sgd(0.1)
    state = finetune.init(vit, config, 3, optimizer)
    rng = np.random.default_rng(0)
    labels = np.arange(8, dtype=np.int32) % 3
    batch = {
        "image": rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8),
        "label": labels,
        "valid": np.arange(8) < 6,
    }
    before = jax.device_get(state.params)
    mix = finetune.draw_mix(rng, 16, 16, 0.0, 0.0)
    state = finetune.make_step(vit.forward, config, 3, optimizer)(state, batch, mix)
    images = (batch["image"][:6] / 255 - np.array(vit.mean)) / np.array(vit.std)
    features = np.asarray(vit.backbone.apply(vit.variables, jnp.asarray(images, jnp.float32)))
    logits = features @ before["head"]["kernel"]
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    grad = (softmax - np.eye(3)[labels[:6]]) / 6
    np.testing.assert_allclose(state.params["head"]["bias"], -0.1 * grad.sum(0), atol=1e-5)
    kernel = before["head"]["kernel"] - 0.1 * features.T @ grad
    np.testing.assert_allclose(state.params["head"]["kernel"], kernel, atol=1e-4)
    np.testing.assert_allclose(state.ema["head"]["kernel"], 0.75 * before["head"]["kernel"] + 0.25 * kernel, atol=1e-4)
    assert int(state.step) == 1


@pytest.mark.extra
def test_one_device_equals_eight(vit, class_folders, monkeypatch):
    config = small(1)
    config.batch_size, config.warmup_epochs, config.lr = 12, 0, 1e-3  # 12 is padded to 16 on eight devices
    source, trained = open_source(str(class_folders / "train")), []
    optimizer = optax.sgd(0.01)
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1}, devices)
        monkeypatch.setattr(finetune, "data_mesh", lambda mesh=mesh: mesh)
        config.erasing = config.drop_path = config.mixup = config.cutmix = 0.0  # drawn for every row, padding included
        state = finetune.init(vit, config, 3, optimizer)
        step = finetune.make_step(vit.forward, config, 3, optimizer)
        state = finetune._train_epoch(vit, source, config, 0, step, state)
        trained.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *trained)


@pytest.mark.parametrize("on", ["mixup", "cutmix", "magnitude"])
def test_each_augmentation_has_its_own_switch(vit, tmp_path, monkeypatch, on):
    """Images of one color stay what they are unless RandAugment is on; mixup has no box, and CutMix no blend."""
    colors = np.random.default_rng(0).integers(256, size=(24, 1, 1, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=np.broadcast_to(colors, (24, 16, 16, 3)), labels=np.arange(24) % 3)
    config, seen = small(), []
    config.update({"mixup": 0.0, "cutmix": 0.0, "magnitude": 0.0, "ema": 0.0} | {on: 0.8 if on != "magnitude" else 9.0})
    record = lambda state, batch, mix: seen.append((np.asarray(batch["image"]), mix)) or state  # noqa: E731
    monkeypatch.setattr(finetune, "make_step", lambda *_: record)
    monkeypatch.setattr(finetune, "_test", lambda *_: {"top1": 0.0})
    finetune.evaluate(vit, f"arrays:{tmp_path / 'a.npz'},arrays:{tmp_path / 'a.npz'}", config)
    assert len(seen) == 6
    known = {tuple(color) for color in colors.reshape(-1, 3)}
    assert ({tuple(i[0, 0]) for images, _ in seen for i in images} <= known) == (on != "magnitude")
    assert any(mix.blend < 1 for _, mix in seen) == (on == "mixup")
    assert any(mix.box.any() for _, mix in seen) == (on == "cutmix")


def test_drop_path_is_unbiased_and_rises(vit):
    config = small()
    config.drop_path = 0.4
    masks = np.asarray(finetune.drop_path(jax.random.key(0), vit.forward, 4000, config))
    assert masks.shape == (2, 2, 4000)
    assert np.all(masks[0] == 1) and set(np.unique(masks[1]).round(4)) == {0, np.float32(1 / 0.6).round(4)}
    np.testing.assert_allclose(masks.mean(-1), 1, atol=4 * np.sqrt(0.4 * 0.6 / 4000) / 0.6)
    together = np.corrcoef(masks[1])  # the two branches of a block have their own draws
    assert abs(together[0, 1]) < 4 / np.sqrt(4000)
