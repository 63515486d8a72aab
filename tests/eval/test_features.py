from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dino_jax.config import default
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval import features
from dino_jax.inference.model import Model
from dino_jax.models import ViT


class Tiny(nn.Module):
    """A minimal backbone: a linear map of the mean color."""

    patch_size: int | None = None

    @nn.compact
    def __call__(self, images):
        return nn.Dense(5, name="out")(images.mean((1, 2)))


@pytest.fixture(scope="module")
def model():
    backbone = Tiny()
    return Model(default(), backbone.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))), backbone)


def batches(images, size):
    index = np.arange(len(images))
    whole = {"image": images, "label": index * 2, "index": index, "valid": np.ones(len(images), bool)}
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, len(images), size)]


def test_extract_equals_a_plain_forward_and_drops_the_filling(model):
    images = np.random.default_rng(0).integers(256, size=(21, 4, 4, 3), dtype=np.uint8)
    got, labels = features.extract(model, batches(images, 9))
    normal = (images / 255 - np.array(model.mean)) / np.array(model.std)
    kernel = model.variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(got, normal.mean((1, 2)) @ np.asarray(kernel), atol=1e-5)
    np.testing.assert_array_equal(labels, 2 * np.arange(21))
    one, _ = features.extract(model, batches(images, 5), devices=jax.devices()[:1])
    np.testing.assert_allclose(got, one, atol=1e-6)


def test_padding_and_unreadable_images_never_count(model):
    images = np.random.default_rng(1).integers(256, size=(6, 4, 4, 3), dtype=np.uint8)
    marked = batches(images, 6)
    marked[0]["valid"][[1, 5]] = False
    _, labels = features.extract(model, marked)
    np.testing.assert_array_equal(labels, [0, 4, 6, 8])
    marked[0]["valid"][:] = False
    with pytest.raises(UserError, match="can be read"):
        features.extract(model, marked)


def test_progress_counts_images_and_an_empty_set_is_an_error(model):
    seen = []
    features.extract(model, batches(np.zeros((7, 4, 4, 3), np.uint8), 4), progress=seen.append)
    assert seen == [4, 7]
    with pytest.raises(UserError, match="--data"):
        features.extract(model, [])


def test_features_of_a_source_are_kept_and_found_again(model, tmp_path):
    images = np.random.default_rng(2).integers(256, size=(11, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(11) % 3)
    config = ConfigDict({"resize": 0, "crop": 7, "batch_size": 4, "workers": 0})
    first = features.source_features(
        model, open_source(str(tmp_path / "set.npz")), str(tmp_path / "set.npz"), config, workdir=str(tmp_path / "work")
    )
    (tmp_path / "set.npz").touch()
    (kept,) = (tmp_path / "work").glob("*.npz")
    stamp = kept.stat().st_mtime_ns
    again = features.source_features(
        model, open_source(str(tmp_path / "set.npz")), str(tmp_path / "set.npz"), config, workdir=str(tmp_path / "work")
    )
    assert kept.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], np.arange(11) % 3)
    other = dataclasses.replace(model, variables=jax.tree.map(lambda x: x + 1, model.variables))
    assert not np.allclose(
        features.source_features(
            other,
            open_source(str(tmp_path / "set.npz")),
            str(tmp_path / "set.npz"),
            config,
            workdir=str(tmp_path / "work"),
        )[0],
        first[0],
    )


def test_features_of_data_that_changed_are_computed_again(model, tmp_path):
    images = np.random.default_rng(2).integers(256, size=(11, 9, 7, 3), dtype=np.uint8)
    config = ConfigDict({"resize": 0, "crop": 7, "batch_size": 4, "workers": 0})
    found = []
    for pixels in (images, images[::-1]):
        np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(11) % 3)
        source = open_source(str(tmp_path / "set.npz"))
        found.append(features.source_features(model, source, "set", config, workdir=str(tmp_path / "work"))[0])
    np.testing.assert_array_equal(found[0], found[1][::-1])


def test_a_cache_that_cannot_be_written_costs_nothing(model, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_arrays", full)
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    config = ConfigDict({"resize": 0, "crop": 8, "batch_size": 4, "workers": 0})
    source = open_source(str(tmp_path / "set.npz"))
    assert len(features.source_features(model, source, "set", config, workdir=str(tmp_path))[0]) == 3
    assert "not written: No space left on device" in caplog.text


def test_too_many_unreadable_images_are_an_error_that_names_one(model, tmp_path):
    from PIL import Image

    for i in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    config = ConfigDict({"resize": 8, "crop": 8, "batch_size": 4, "workers": 0})
    with pytest.raises(UserError, match=r"2\.png"):
        features.source_features(model, open_source(str(tmp_path)), str(tmp_path), config)


def test_linear_input_order():
    pooled = {"cls": jnp.arange(8.0).reshape(1, 4, 2), "mean": jnp.array([[10.0, 11]])}
    np.testing.assert_array_equal(features.linear_input(pooled, 2, False), [[4, 5, 6, 7]])
    np.testing.assert_array_equal(features.linear_input(pooled, 1, True), [[6, 10, 7, 11]])
    np.testing.assert_array_equal(features.linear_input(pooled, 2, True), [[4, 5, 6, 7, 10, 11]])


def test_linear_input_reference(load_reference):
    params, wanted = load_reference("vit.npz"), load_reference("linear_features.npz")
    heads = params["attn/32x32"].shape[1]
    get = lambda name: params[f"param/{name}"]  # noqa: E731
    depth = len([key for key in params if key.endswith("norm1.weight")])
    patch = get("patch_embed.proj.weight").shape[-1]
    side = patch * round((get("pos_embed").shape[1] - 1) ** 0.5)
    backbone = ViT(get("pos_embed").shape[-1], depth, heads, patch, (side, side))

    def layer(prefix):
        weight, bias = get(f"{prefix}.weight"), get(f"{prefix}.bias")
        if weight.ndim == 1:
            return {"scale": weight, "bias": bias}
        return {"kernel": np.moveaxis(weight, (0, 1), (-1, -2)) if weight.ndim == 4 else weight.T, "bias": bias}

    def block(i):
        parts = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
        nested = {part: {name: layer(f"blocks.{i}.{part}.{name}") for name in names} for part, names in parts.items()}
        return nested | {name: layer(f"blocks.{i}.{name}") for name in ("norm1", "norm2")}

    tree = {f"blocks_{i}": block(i) for i in range(depth)}
    tree |= {name: get(name) for name in ("cls_token", "pos_embed")}
    tree |= {"patch_embed": layer("patch_embed.proj"), "norm": layer("norm")}
    pooled = backbone.apply({"params": tree}, np.moveaxis(wanted["in"], 1, -1), method=features.Pooled(2))
    np.testing.assert_allclose(features.linear_input(pooled, 2, False), wanted["n2"], atol=1e-4)
    np.testing.assert_allclose(features.linear_input(pooled, 1, True), wanted["n1_avgpool"], atol=1e-4)


def test_attention_and_patches_keep_the_grid(vit):
    images = np.random.default_rng(3).integers(256, size=(2, 8, 12, 3), dtype=np.uint8)
    (attention, _), *_ = features.run(vit, features.ClsAttention(), batches(images, 2))
    (patches, _), *_ = features.run(vit, features.Patches(), batches(images, 2))
    assert attention.shape == (2, 2, 2, 3) and patches.shape == (2, 2, 3, 16)
    assert np.all(attention.sum((2, 3)) < 1)
