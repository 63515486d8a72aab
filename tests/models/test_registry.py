"""The registry: parameter counts of every model, and how the configuration chooses one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.models import BACKBONES, build_backbone, build_network

# (model, patch or stem) -> parameters, without a classifier, as timm 1.0.31 and torchvision 0.28 count them; in
# `FAMILY` those of DINOv2 and DINOv3, whose settings differ (timm counts no mask token, and one row less in a table
# beside registers).
PARAMETERS = {
    ("vit_tiny", 16): 5_524_416,
    ("vit_small", 16): 21_665_664,
    ("vit_small", 8): 21_670_272,
    ("vit_base", 16): 85_798_656,
    ("vit_base", 8): 85_807_872,
    ("vit_large", 16): 303_301_632,
    ("resnet18", "imagenet"): 11_176_512,
    ("resnet18", "small"): 11_176_512 - (7 * 7 - 3 * 3) * 3 * 64,
    ("resnet50", "imagenet"): 23_508_032,
    ("resnet101", "imagenet"): 42_500_160,
    ("xcit_small_12", 16): 25_868_304,
    ("xcit_small_12", 8): 25_828_032,
    ("xcit_medium_24", 16): 83_882_752,
    ("xcit_medium_24", 8): 83_810_624,
}
DINOV2 = {"patch_size": 14, "layer_scale": 1e-5}
DINOV3 = {"layer_scale": 1e-5, "registers": 4, "positions": "rope", "norm_eps": 1e-5}
FAMILY = [
    ("vit_small", DINOV2, 22_056_192),
    ("vit_small", DINOV2 | {"registers": 4}, 22_057_344 + 384),
    ("vit_giant2", DINOV2, 1_136_479_232),
    ("vit_small", DINOV3 | {"qkv_bias": "qv"}, 21_596_160),
    ("vit_small_plus", DINOV3 | {"qkv_bias": "qv"}, 28_692_480),
    ("vit_huge_plus", DINOV3 | {"qkv_bias": "qv"}, 840_591_360),
    ("vit_7b", DINOV3 | {"qkv_bias": "none"}, 6_716_030_976),
]


def model_config(**changes):
    config = default().model
    config.update(changes)
    return config


@pytest.mark.parametrize(("name", "variant"), PARAMETERS)
def test_parameter_count(name, variant):
    changes = {"small_stem": variant == "small"} if isinstance(variant, str) else {"patch_size": variant}
    model = build_backbone(model_config(name=name, **changes), 224)
    images = jnp.zeros((2, 224, 224, 3))
    feature, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name, variant]
    assert feature.shape == (2, model.embed_dim)


@pytest.mark.parametrize(("name", "settings", "count"), FAMILY)
def test_parameter_count_of_the_family(name, settings, count):
    size = 518 if settings.get("patch_size") == 14 else 224
    model = build_backbone(model_config(name=name, **settings), size)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


def test_every_model_is_counted():
    assert {name for name, _ in PARAMETERS} | {name for name, _, _ in FAMILY} == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_drop_rates_fit_the_drop_path_factors(name):
    model = build_backbone(model_config(name=name), 224)
    rates = model.drop_rates(0.3)
    assert rates.shape[0] == model.depth
    if name.startswith("vit"):
        np.testing.assert_allclose(rates, np.linspace(0, 0.3, model.depth)[:, None] * np.ones(2))
    elif name.startswith("xcit"):  # the official XCiT: the same rate in every block, three branches
        np.testing.assert_array_equal(rates, np.full((model.depth, 3), 0.3))


def test_the_configuration_is_read():
    changes = {"name": "vit_tiny", "patch_size": 8, "in_chans": 1, "depth": 2, "dtype": "bfloat16"}
    model = build_backbone(model_config(**changes), (32, 64), remat="blocks")
    assert (model.embed_dim, model.depth, model.heads, model.remat) == (192, 2, 3, True)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 64, 1)))
    assert variables["params"]["pos_embed"].shape == (1, 1 + 4 * 8, 192)
    assert build_backbone(model_config(), 32).image_size == (32, 32)


def test_network_reads_every_group():
    config = default()
    config.model.update({"name": "resnet18", "small_stem": True, "dtype": "bfloat16"})
    config.head.update({"out_dim": 10, "hidden_dim": 16, "bottleneck_dim": 8, "norm_last_layer": False})
    network = build_network(config)
    crops = [jnp.zeros((2, 2, 32, 32, 3)), jnp.zeros((2, 1, 16, 16, 3))]
    variables = jax.eval_shape(network.init, jax.random.key(0), crops)
    assert variables["params"]["head"]["last_layer"]["g"].shape == (10, 1)
    assert sorted(variables["batch_stats"]) == ["backbone"]
    logits = jax.eval_shape(network.apply, variables, crops).logits
    assert (logits.shape, logits.dtype) == ((2, 3, 10), jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_smal"}, "did you mean 'vit_small'"),
        ({"dtype": "float16"}, "model.dtype"),
        ({"precision": "low"}, "model.precision"),
        ({"heads": 5}, "not divisible by model.heads 5"),
        ({"patch_size": 15}, "224 x 224 pixels .* patches of 15"),
        ({"name": "resnet50", "depth": 3}, "model.depth does not apply to resnet50"),
        ({"small_stem": True}, "model.small_stem does not apply to vit_small"),
        ({"name": "xcit_small_12", "init_std": 0.1}, "model.init_std does not apply to xcit_small_12"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        build_backbone(model_config(**changes), 224)
    with pytest.raises(UserError, match=r"run\.remat='all'"):
        build_backbone(model_config(), 224, "all")
