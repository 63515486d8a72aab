"""The renderer on the accelerator against PIL: each operation, whole crops, sharding and compiled cost."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default
from dino_jax.data import crops as pil
from dino_jax.parallel.sharding import batch_sharding, make_mesh
from dino_jax.render import ops as render_ops
from dino_jax.render import renderer as render
from dino_jax.render.renderer import make_renderer

SIDE = 160  # of the canvas
KINDS = ("smooth", "textured", "noise")
MONO = {"model.in_chans": 1, "data.mean": (0.0,), "data.std": (1.0,)}  # no color operations, so it compiles fast


def random_image(rng: np.random.Generator, height: int, width: int, kind: str, channels: int = 3) -> np.ndarray:
    """A random image, uint8 [height, width, channels]; white noise is the hardest case for every operation."""
    if kind == "noise":
        return rng.integers(0, 256, (height, width, channels), np.uint8)
    coarse = rng.integers(0, 256, (channels, height // 12 + 2, width // 12 + 2), np.uint8)
    planes = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)) for plane in coarse]
    grain = rng.normal(0, 10 if kind == "textured" else 0, (height, width, channels))
    return np.clip(np.stack(planes, -1) + grain, 0, 255).astype(np.uint8)


def planar(image: np.ndarray) -> jax.Array:  # [C, H, W]
    return jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0)


def difference(planes: jax.Array | list[jax.Array], reference: Image.Image | np.ndarray) -> float:
    """Mean absolute difference between float planes [C, H, W] and uint8 [H, W, C], in levels of 255."""
    return float(np.abs(np.moveaxis(np.asarray(planes), 0, -1) - np.asarray(reference, np.float32)).mean())


def canvas_of(image: np.ndarray, padding: int = 0, side: int = SIDE) -> np.ndarray:
    canvas = np.full((side, side, image.shape[-1]), padding, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def random_box(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tall, wide = rng.integers(1, height + 1), rng.integers(1, width + 1)
    return np.array([rng.integers(height - tall + 1), rng.integers(width - wide + 1), tall, wide], np.int32)


def small_config(**overrides):
    """Renders 2 crops of 48 x 40 and 3 of 24 x 32 from a canvas of 80; output in 0..1."""
    config = default()
    config.data.render, config.data.canvas = "device", 80
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.crops.global_size, config.crops.local_size, config.crops.local_count = (48, 40), (24, 32), 3
    config.update_from_flattened_dict(overrides)
    return config


def random_batch(config, rng: np.random.Generator, count: int, channels: int = 3):
    """Images, and the pipeline's batch of them."""
    side = config.data.canvas
    sizes = rng.integers(20, side + 1, (count, 2))
    images = [random_image(rng, *size, KINDS[i % 3], channels) for i, size in enumerate(sizes)]
    params = [pil.draw_crops(rng, *size, config.crops, channels == 3) for size in sizes]
    batch = {
        "canvas": np.stack([canvas_of(image, 0, side) for image in images]),
        "params": jax.tree.map(lambda *x: np.stack(x), *params),
        "label": np.zeros(count, np.int32),
    }
    return images, params, batch


@pytest.fixture(scope="module")
def ops() -> types.SimpleNamespace:
    """The operations, compiled once."""

    def color(function):
        return jax.jit(lambda image, *args: function(list(image), *args))

    return types.SimpleNamespace(
        resample=jax.jit(render_ops.resample, static_argnums=3),
        jitter=color(render_ops.jitter),
        blur=color(render_ops.blur),
        gray=color(render_ops.gray),
        solarize=render_ops.solarize,
    )


@pytest.mark.parametrize("size", [(32, 32), (97, 64), (224, 224)])
def test_resample_is_pils(ops, size):
    rng = np.random.default_rng(size[0])
    errors = []
    for i in range(24):
        height, width = rng.integers(1, SIDE + 1, 2) if i % 4 else (SIDE, SIDE)
        image, mirror = random_image(rng, height, width, KINDS[i % 3]), bool(rng.integers(2))
        box = random_box(rng, height, width)
        reference = pil.crop_resize(Image.fromarray(image), box, size)
        reference = pil.flip(reference) if mirror else reference
        errors.append(difference(ops.resample(planar(canvas_of(image, 255)), box, mirror, size), reference))
    assert max(errors) < 0.7 and np.mean(errors) < 0.35


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (1, 1, (0, 0, 1, 1)),
        (160, 1, (3, 0, 150, 1)),
        (1, 160, (0, 7, 1, 153)),
        (160, 3, (0, 1, 1, 1)),
        (7, 131, (6, 130, 1, 1)),
    ],
)
def test_resample_of_degenerate_boxes(ops, height, width, box):
    image = random_image(np.random.default_rng(0), height, width, "noise")
    reference = pil.crop_resize(Image.fromarray(image), box, (32, 32))
    result = ops.resample(planar(canvas_of(image, 255)), np.array(box, np.int32), False, (32, 32))
    assert difference(result, reference) < 0.5


def test_resample_reads_nothing_outside_the_box(ops):
    rng = np.random.default_rng(1)
    box = np.array([40, 50, 61, 33], np.int32)
    inside = random_image(rng, 61, 33, "noise")
    surroundings = [np.zeros((SIDE, SIDE, 3), np.uint8), random_image(rng, SIDE, SIDE, "noise")]
    results = []
    for canvas in surroundings:
        canvas[40:101, 50:83] = inside
        results.append(np.asarray(ops.resample(planar(canvas), box, False, (32, 32))))
    np.testing.assert_array_equal(*results)


def test_resample_to_its_own_size_changes_nothing(ops):
    image = random_image(np.random.default_rng(2), SIDE, SIDE, "noise")
    result = ops.resample(planar(image), np.array([17, 60, 32, 32], np.int32), False, (32, 32))
    np.testing.assert_allclose(result, planar(image[17:49, 60:92]), atol=1e-4)


def test_flip_is_exact(ops):
    canvas, box = (
        planar(random_image(np.random.default_rng(3), SIDE, SIDE, "noise")),
        np.array([3, 5, 90, 121], np.int32),
    )
    straight, mirrored = (ops.resample(canvas, box, flip, (97, 64)) for flip in (False, True))
    np.testing.assert_allclose(mirrored, straight[..., ::-1], atol=1e-4)


def test_resample_in_bfloat16_is_close_enough(ops):
    rng = np.random.default_rng(4)
    errors = []
    for i in range(12):
        image, box = random_image(rng, 150, 120, KINDS[i % 3]), random_box(rng, 150, 120)
        result = ops.resample(planar(canvas_of(image)).astype(jnp.bfloat16), box, False, (97, 64))
        assert result.dtype == jnp.float32
        errors.append(difference(result, pil.crop_resize(Image.fromarray(image), box, (97, 64))))
    assert np.mean(errors) < 0.5 and max(errors) < 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_one_operation_of_the_jitter(ops, operation, kind):
    rng = np.random.default_rng(operation)
    for _ in range(6):
        image = random_image(rng, 64, 48, kind)
        factors = np.array(pil.NEUTRAL, np.float32)
        factors[operation] = rng.uniform(-0.5, 0.5) if operation == render_ops.HUE else rng.uniform(0, 2)
        reference = pil.JITTER[operation](Image.fromarray(image), float(factors[operation]))
        order = rng.permutation(4).astype(np.int32)
        assert difference(ops.jitter(planar(image), order, factors), reference) < 0.4


def test_jitter_in_every_order(ops):
    rng = np.random.default_rng(5)
    orders = np.stack(np.meshgrid(*[np.arange(4)] * 4), -1).reshape(-1, 4)
    orders = [order for order in orders.astype(np.int32) if len(set(order)) == 4]
    assert len(orders) == 24
    for i, order in enumerate(orders):
        image = random_image(rng, 64, 48, KINDS[i % 3])
        factors = np.array([*rng.uniform(0.6, 1.4, 2), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)], np.float32)
        reference = Image.fromarray(image)
        for operation in order:
            reference = pil.JITTER[operation](reference, float(factors[operation]))
        assert difference(ops.jitter(planar(image), order, factors), reference) < 1.0


def test_neutral_jitter_changes_nothing(ops):
    image = planar(random_image(np.random.default_rng(6), 64, 48, "noise"))
    jittered = ops.jitter(image, np.array([2, 3, 0, 1]), np.array(pil.NEUTRAL, np.float32))
    np.testing.assert_array_equal(np.stack(jittered), image)


@pytest.mark.parametrize("kind", ["smooth", "textured"])
def test_blur_is_pils(ops, kind):
    rng = np.random.default_rng(7)
    errors = []
    for radius in np.linspace(0.1, 2.0, 20, dtype=np.float32):
        image = random_image(rng, 64, 48, kind)
        errors.append(difference(ops.blur(planar(image), radius), pil.blur(Image.fromarray(image), float(radius))))
    assert max(errors) < 0.95 and np.mean(errors) < 0.6


def test_blur_of_white_noise(ops):
    """Averaged over the recipe's radii; PIL rounds six times here."""
    rng = np.random.default_rng(8)
    image = random_image(rng, 64, 48, "noise")
    radii = rng.uniform(0.1, 2.0, 24).astype(np.float32)
    errors = [difference(ops.blur(planar(image), r), pil.blur(Image.fromarray(image), float(r))) for r in radii]
    assert np.mean(errors) < 0.6 and max(errors) < 1.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 3)])
def test_blur_repeats_the_edge(ops, height, width):
    """Images smaller than the kernel."""
    image = random_image(np.random.default_rng(9), height, width, "noise")
    for radius in (0.7, 1.3, 2.0):
        assert difference(ops.blur(planar(image), jnp.float32(radius)), pil.blur(Image.fromarray(image), radius)) < 1


def test_blur_of_radius_zero_changes_nothing(ops):
    image = planar(random_image(np.random.default_rng(10), 64, 48, "noise"))
    np.testing.assert_array_equal(np.stack(ops.blur(image, jnp.float32(0))), image)


@pytest.mark.parametrize("kind", KINDS)
def test_gray_and_solarize(ops, kind):
    image = random_image(np.random.default_rng(11), 64, 48, kind)
    assert difference(ops.gray(planar(image)), pil.gray(Image.fromarray(image))) < 0.3
    for threshold in (0, 1, 128, 255):
        assert difference(ops.solarize(planar(image), threshold), pil.solarize(Image.fromarray(image), threshold)) == 0


def test_whole_crops_are_pils():
    config, rng = small_config(), np.random.default_rng(12)
    images, params, batch = random_batch(config, rng, 24)
    rendered = make_renderer(config)(batch)
    errors = []
    for i, image in enumerate(images):
        references = pil.render_crops(image, params[i], config.crops)
        for crops, reference in zip(rendered, references, strict=True):
            assert crops[i].shape == reference.shape
            errors += list(np.abs(np.asarray(crops[i]) * 255.0 - reference).mean(axis=(1, 2, 3)))
    assert np.mean(errors) < 0.7 and max(errors) < 1.8


def test_rendering_is_deterministic_and_in_chunks(monkeypatch):
    config = small_config(**MONO)
    _, _, batch = random_batch(config, np.random.default_rng(13), 5, 1)
    whole = make_renderer(config)(batch)
    monkeypatch.setattr(render, "CHUNK", 2)
    chunked, again = make_renderer(config)(batch), make_renderer(config)(batch)
    jax.tree.map(np.testing.assert_array_equal, chunked, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, chunked)


def test_host_mode_only_normalizes():
    config = small_config(**{"data.render": "host", "data.mean": (0.5, 0.25, 0.1), "data.std": (0.2, 0.5, 1.0)})
    rng = np.random.default_rng(14)
    batch = {
        "globals": rng.integers(0, 256, (2, 2, 48, 40, 3), np.uint8),
        "locals": rng.integers(0, 256, (2, 3, 24, 32, 3), np.uint8),
        "label": np.zeros(2, np.int32),
    }
    for crops, source in zip(make_renderer(config)(batch), (batch["globals"], batch["locals"]), strict=True):
        np.testing.assert_allclose(crops, (source / 255 - config.data.mean) / config.data.std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["host", "device"])
def test_no_local_crops_and_compute_dtype(mode):
    config = small_config(**{"data.render": mode, "crops.local_count": 0, "model.dtype": "bfloat16", **MONO})
    _, _, batch = random_batch(config, np.random.default_rng(15), 1, 1)
    batch["globals"] = np.zeros((1, 2, 48, 40, 1), np.uint8)
    (crops,) = make_renderer(config)(batch)
    assert crops.shape == (1, 2, 48, 40, 1) and crops.dtype == jnp.bfloat16


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_resampled_mirrored_and_normalized(channels):
    mean, std = (0.1, 0.2, 0.3, 0.4)[:channels], (0.5, 0.6, 0.7, 0.8)[:channels]
    config = small_config(**{"data.mean": mean, "data.std": std, "model.in_chans": channels})
    images, params, batch = random_batch(config, np.random.default_rng(16), 3, channels)
    rendered = make_renderer(config)(batch)
    for i, image in enumerate(images):
        for crops, reference in zip(rendered, pil.render_crops(image, params[i], config.crops), strict=True):
            levels = (np.asarray(crops[i]) * std + mean) * 255
            assert np.abs(levels - reference).mean() < 0.5


def test_each_device_renders_its_own_images():
    config = small_config(**{"crops.local_count": 0})
    sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "model": 1}, jax.devices()[:4]))
    _, _, batch = random_batch(config, np.random.default_rng(17), 8)
    placed = jax.device_put(batch, sharding)
    alone = make_renderer(config).lower(batch).compile()
    spread = make_renderer(config, sharding).lower(placed).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in spread.as_text()
    assert spread.cost_analysis()["flops"] == pytest.approx(alone.cost_analysis()["flops"] / 4, rel=0.02)
    (crops,), (expected,) = spread(placed), alone(batch)
    assert crops.sharding.is_equivalent_to(sharding, crops.ndim)
    np.testing.assert_allclose(crops, expected, atol=1e-4)


def renderer_flops(images: int) -> float:
    """The compiler's FLOP count for the default recipe (2 x 224 and 8 x 96 from a canvas of 512)."""
    config = default()
    config.data.render = "device"
    drawn = pil.draw_crops(np.random.default_rng(0), 375, 500, config.crops)
    batch = {
        "canvas": jax.ShapeDtypeStruct((images, config.data.canvas, config.data.canvas, 3), np.uint8),
        "params": jax.tree.map(lambda x: jax.ShapeDtypeStruct((images, *x.shape), x.dtype), drawn),
    }
    return make_renderer(config).lower(batch).compile().cost_analysis()["flops"]


def test_rendering_costs_few_flops():
    """Relative to the matrix products of a ViT-S/16 step: student forward and backward, teacher forward."""

    def forward(side: int) -> float:
        tokens, width = (side // 16) ** 2 + 1, 384
        blocks = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
        head = 2 * (384 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536)
        return blocks + 2 * (tokens - 1) * 3 * 16**2 * width + head

    step = 3 * (2 * forward(224) + 8 * forward(96)) + 2 * forward(224)
    assert 0.01 < renderer_flops(2) / 2 / step < 0.03


@pytest.mark.extra
def test_rendering_costs_few_flops_of_the_compiled_step():
    from dino_jax.training import step as train_step

    config = default()
    recipe = train_step.make_recipe(config, 100)
    state = jax.eval_shape(lambda: train_step.init_state(recipe, jax.random.key(0)))
    crops = [jax.ShapeDtypeStruct((2, n, s, s, 3), jnp.float32) for n, s in ((2, 224), (8, 96))]
    step = jax.jit(lambda state, crops: train_step.train_step(recipe, state, crops)).lower(state, crops).compile()
    assert renderer_flops(2) < 0.03 * step.cost_analysis()["flops"]
