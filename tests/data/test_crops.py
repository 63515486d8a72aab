"""Multi-crop: the sampler against closed forms, the renderer against PIL and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from dino_jax.config import default
from dino_jax.data import crops as C
from dino_jax.data.crops import CropParams, center_box, draw_boxes, draw_crops, render_crops
from tests.peers import peer

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """An image with edges and noise, uint8 [90, 120, 3]."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (120, 90), Image.Resampling.BICUBIC
    )
    return (np.asarray(coarse) + rng.normal(0, 12, (90, 120, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pil_image(image) -> Image.Image:
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def drawn() -> CropParams:
    """Parameters of 2,000 images: every array [2000, 10, ...]."""
    crops = default().crops
    rng = np.random.default_rng(1)
    many = [draw_crops(rng, 300, 400, crops) for _ in range(2000)]
    return CropParams(*map(np.stack, zip(*many, strict=True)))


def one_by_one(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> tuple[int, ...]:
    """Reference for the box rule, one box at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide
    return center_box(height, width, RATIO)


def boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    draws = np.random.default_rng(2).random((count, C.TRIES, 4))
    return draw_boxes(draws, height, width, np.tile(scale, (count, 1)), RATIO)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (7, 9), (64, 300)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_the_rule_drawn_one_number_at_a_time(height, width, scale):
    ours = boxes(3000, height, width, scale)
    rng = np.random.default_rng(3)
    theirs = np.array([one_by_one(rng, height, width, scale) for _ in range(3000)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    area = [found[:, 2] * found[:, 3] for found in (ours, theirs)]
    assert stats.ks_2samp(*area).pvalue > 1e-3


def test_boxes_lie_in_the_image_with_uniform_area_log_uniform_ratio_and_uniform_place():
    size = 10_000  # so large that rounding is negligible, and areas so small that every try fits
    found = boxes(4000, size, size, (0.05, 0.4)).astype(float)
    top, left, tall, wide = found.T
    assert found.min() >= 0
    assert (top + tall).max() <= size
    assert (left + wide).max() <= size
    tests = [
        stats.kstest(tall * wide / size**2, stats.uniform(0.05, 0.35).cdf),
        stats.kstest(np.log(wide / tall), stats.uniform(np.log(0.75), np.log(4 / 3) - np.log(0.75)).cdf),
        stats.kstest(top / (size - tall), stats.uniform.cdf),
        stats.kstest(left / (size - wide), stats.uniform.cdf),
    ]
    assert min(test.pvalue for test in tests) > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (1, 500, (0, 249, 1, 1)), (1, 1, (0, 0, 1, 1))],
)
def test_images_too_long_for_any_try_fall_back_to_their_center(height, width, expected):
    found = boxes(50, height, width, (0.9, 1.0))
    assert (found == expected).all()


def test_every_share_of_flips_and_color_operations_is_the_recipes(drawn):
    crops, count = default().crops, 2000
    expected = [
        (drawn.flip.sum(), count * 10, 0.5),
        (drawn.jitter.sum(), count * 10, 0.8),
        (drawn.gray.sum(), count * 10, 0.2),
        ((drawn.blur[:, 0] > 0).sum(), count, 1.0),
        ((drawn.blur[:, 1] > 0).sum(), count, 0.1),
        ((drawn.blur[:, 2:] > 0).sum(), count * 8, 0.5),
        (drawn.solarize[:, 0].sum(), count, 0.0),
        (drawn.solarize[:, 1].sum(), count, 0.2),
        (drawn.solarize[:, 2:].sum(), count * 8, 0.0),
    ]
    for seen, tries, share in expected:
        assert stats.binomtest(int(seen), tries, share).pvalue > 1e-3
    assert crops.blur_prob == (1.0, 0.1, 0.5)


def test_strengths_are_uniform_and_orders_equally_likely(drawn):
    factors = drawn.factors[drawn.jitter]
    for column, (center, spread) in enumerate([(1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1)]):
        uniform = stats.uniform(center - spread, 2 * spread)
        assert stats.kstest(factors[:, column], uniform.cdf).pvalue > 1e-3
    assert (drawn.factors[~drawn.jitter] == C.NEUTRAL).all()
    radius = drawn.blur[drawn.blur > 0]
    assert stats.kstest(radius, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    codes = drawn.order.reshape(-1, 4) @ [64, 16, 4, 1]
    values, counts = np.unique(codes, return_counts=True)
    assert len(values) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_global_and_local_boxes_have_their_own_scales(drawn):
    share = drawn.box[..., 2] * drawn.box[..., 3] / (300 * 400)  # rounding to whole pixels moves it by less than 1%
    assert share[:, :2].min() > 0.39
    assert share[:, 2:].min() > 0.049
    assert share[:, 2:].max() < 0.404


def test_the_same_generator_gives_related_boxes_at_any_resolution():
    crops = default().crops
    small, large = (draw_crops(np.random.default_rng(5), height, 4 * height // 3, crops) for height in (300, 1200))
    np.testing.assert_allclose(small.box * 4, large.box, atol=9)
    np.testing.assert_array_equal(small.factors, large.factors)


def test_without_color_only_box_and_flip_are_drawn():
    params = draw_crops(np.random.default_rng(0), 60, 80, default().crops, color=False)
    assert not params.jitter.any()
    assert not params.gray.any()
    assert not params.solarize.any()
    assert (params.blur == 0).all()
    assert (params.factors == C.NEUTRAL).all()
    np.testing.assert_array_equal(params.box, draw_crops(np.random.default_rng(0), 60, 80, default().crops).box)


@pytest.mark.parametrize("box", [(0, 0, 90, 120), (10, 20, 33, 41), (89, 119, 1, 1), (5, 0, 80, 7)])
def test_crop_resize_is_pils_cut_then_resize(pil_image, box):
    top, left, height, width = box
    expected = pil_image.crop((left, top, left + width, top + height)).resize((40, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(C.crop_resize(pil_image, np.array(box), (32, 40)), expected)


def hue_by_arrays(pil_image: Image.Image, shift: float) -> Image.Image:
    hsv = np.array(pil_image.convert("HSV")).astype(np.int64)
    hsv[..., 0] = (hsv[..., 0] + math.trunc(shift * 255)) % 256
    return Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("ours", "pils", "values"),
    [
        (C.flip, lambda p, _: ImageOps.mirror(p), [None]),
        (C.brightness, lambda p, f: ImageEnhance.Brightness(p).enhance(f), [0.6, 1.0, 1.37]),
        (C.contrast, lambda p, f: ImageEnhance.Contrast(p).enhance(f), [0.6, 1.0, 1.37]),
        (C.saturation, lambda p, f: ImageEnhance.Color(p).enhance(f), [0.8, 1.0, 1.17]),
        (C.hue, hue_by_arrays, [-0.1, -0.001, 0.0, 0.0393, 0.1, 0.5]),
        (C.gray, lambda p, _: Image.merge("RGB", [p.convert("L")] * 3), [None]),
        (C.blur, lambda p, r: p.filter(ImageFilter.GaussianBlur(r)), [0.1, 0.77, 2.0]),
        (C.solarize, lambda p, t: p.point([v if v < t else 255 - v for v in range(256)] * 3), [128, 0, 200]),
    ],
)
def test_each_operation_equals_pils_to_the_bit(pil_image, ours, pils, values):
    for value in values:
        result = ours(pil_image) if value is None else ours(pil_image, value)
        np.testing.assert_array_equal(result, pils(pil_image, value))


def test_render_applies_the_operations_in_the_recipes_order(image, pil_image):
    config = default()
    config.crops.global_size, config.crops.local_size, config.crops.local_count = (32, 40), (16, 20), 1
    params = CropParams(
        box=np.array([[0, 0, 90, 120], [4, 8, 50, 70], [30, 40, 20, 30]], np.int32),
        flip=np.array([False, True, False]),
        order=np.array([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]], np.int32),
        factors=np.array([C.NEUTRAL, [0.7, 1.3, 0.9, 0.08], [1.2, 0.8, 1.1, -0.05]], np.float32),
        jitter=np.array([False, True, True]),
        gray=np.array([False, False, True]),
        blur=np.array([0, 1.5, 0], np.float32),
        solarize=np.array([False, True, False]),
    )
    large, small = render_crops(image, params, config.crops)
    assert large.dtype == small.dtype == np.uint8
    assert large.shape == (2, 32, 40, 3)
    assert small.shape == (1, 16, 20, 3)
    np.testing.assert_array_equal(large[0], C.crop_resize(pil_image, params.box[0], (32, 40)))
    second = C.flip(C.crop_resize(pil_image, params.box[1], (32, 40)))
    f = [float(x) for x in params.factors[1]]
    second = C.saturation(C.brightness(C.contrast(C.hue(second, f[3]), f[1]), f[0]), f[2])
    np.testing.assert_array_equal(large[1], C.solarize(C.blur(second, 1.5), 128))
    third = C.crop_resize(pil_image, params.box[2], (16, 20))
    f = [float(x) for x in params.factors[2]]
    third = C.brightness(C.contrast(C.hue(C.saturation(third, f[2]), f[3]), f[1]), f[0])
    np.testing.assert_array_equal(small[0], C.gray(third))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_are_cut_and_flipped_channel_by_channel(image, channels):
    config = default()
    config.crops.global_size, config.crops.local_size = (24, 24), (12, 12)
    params = draw_crops(np.random.default_rng(0), 90, 120, config.crops)
    planes = image[..., np.arange(channels) % 3]
    large, small = render_crops(planes, params, config.crops)
    assert large.shape == (2, 24, 24, channels)
    assert small.shape == (8, 12, 12, channels)
    for k in range(channels):
        expected = C.crop_resize(Image.fromarray(planes[..., k].copy()), params.box[0], (24, 24))
        np.testing.assert_array_equal(large[0, ..., k], C.flip(expected) if params.flip[0] else expected)


@pytest.mark.extra
def test_each_operation_equals_torchvisions(pil_image):
    functional = peer("torchvision.transforms.functional")
    bicubic = peer("torchvision.transforms").InterpolationMode.BICUBIC
    box = (10, 20, 33, 41)
    np.testing.assert_array_equal(
        C.crop_resize(pil_image, np.array(box), (32, 40)), functional.resized_crop(pil_image, *box, (32, 40), bicubic)
    )
    np.testing.assert_array_equal(C.flip(pil_image), functional.hflip(pil_image))
    np.testing.assert_array_equal(C.gray(pil_image), functional.rgb_to_grayscale(pil_image, 3))
    np.testing.assert_array_equal(C.solarize(pil_image, 128), functional.solarize(pil_image, 128))
    for name, factor in [("brightness", 0.7), ("contrast", 1.3), ("saturation", 0.9), ("hue", -0.07), ("hue", 0.1)]:
        theirs = getattr(functional, f"adjust_{name}")(pil_image, factor)
        np.testing.assert_array_equal(getattr(C, name)(pil_image, factor), theirs, err_msg=name)


@pytest.mark.extra
@pytest.mark.parametrize(("height", "width"), [(300, 400), (33, 200)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    torch = pytest.importorskip("torch")
    transforms = peer("torchvision.transforms")
    torch.manual_seed(0)
    blank, scale = Image.new("RGB", (width, height)), (0.05, 0.4)
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, scale, RATIO) for _ in range(4000)])
    ours = boxes(4000, height, width, scale)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


def test_large_images_are_cut_channel_by_channel_with_the_same_pixels(monkeypatch):
    rng = np.random.default_rng(0)
    for channels in (1, 3, 4):
        image = rng.integers(0, 256, (61, 83, channels), dtype=np.uint8)
        params = C.draw_crops(np.random.default_rng(1), 61, 83, default().crops, color=channels == 3)
        monkeypatch.undo()
        expected = C.render_crops(image, params, default().crops)
        monkeypatch.setattr(C, "MANY_BYTES", 0)
        for found, wanted in zip(C.render_crops(image, params, default().crops), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
