"""Features of images of any size: equal to each image alone, in order, without a compilation per size."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.inference import model as features
from dino_jax.inference.model import Model, load, write_features
from dino_jax.weights import architecture
from dino_jax.weights.pth import write_pth

SIZES = [(32, 32), (16, 40), (32, 32), (40, 16), (8, 8), (37, 45)]


def model_of(name: str = "vit_tiny", devices=None) -> Model:
    config, rng = default(), np.random.default_rng(0)
    config.model.name, config.model.patch_size = name, 8
    if name.startswith("vit"):
        config.model.update({"embed_dim": 24, "depth": 1, "heads": 3})
    if name.startswith("xcit"):
        config.model.update({"embed_dim": 32, "depth": 1, "heads": 4})
    if name == "small_stem":
        config.model.update({"name": "resnet18", "small_stem": True})
    config.crops.global_size = (32, 32)

    def number(path, leaf):  # batch norm's statistics and positions matter
        values = rng.normal(0, 0.5 / max(1, leaf.ndim - 1), leaf.shape).astype(np.float32)
        return np.abs(values) + 1 if path[-1].key == "var" else values / np.sqrt(np.prod(leaf.shape[:-1]))

    variables = jax.tree_util.tree_map_with_path(number, architecture.backbone_shapes(config))
    return Model(config, variables, devices=devices or jax.devices()[:1])


@pytest.fixture(scope="module")
def vit():
    return model_of()


def random_images(sizes=SIZES, channels=3):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(*size, channels)).astype(np.float32) for size in sizes]


def alone(model, image):
    """CLS [D] and patches [rows, columns, D] of one image by the plain forward pass."""
    p = model.backbone.patch_size or 1
    image = image[: image.shape[0] // p * p, : image.shape[1] // p * p]
    tokens = jax.jit(lambda variables, x: model.backbone.apply(variables, x, method="tokens"))
    found = tokens(jax.device_get(model.variables), image[None])
    return np.asarray(found.cls[0, 0]), np.asarray(found.patches[0, 0])


@pytest.mark.parametrize("devices", [1, 8])
def test_any_sizes_equal_each_image_alone(devices):
    model = model_of(devices=jax.devices()[:devices])
    images = random_images()
    cls, patches = model.features(images, patches=True)
    assert cls.shape == (len(SIZES), 24)
    assert cls.dtype == np.float32
    for i, image in enumerate(images):
        feature, tokens = alone(model, image)
        np.testing.assert_allclose(cls[i], feature, atol=1e-5)
        assert patches[i].shape == (image.shape[0] // 8, image.shape[1] // 8, 24)
        np.testing.assert_allclose(patches[i], tokens, atol=1e-5)
    np.testing.assert_allclose(model.features(images), cls, atol=1e-6)


def test_new_sizes_compile_next_to_nothing(vit):
    vit.features(random_images())
    before = vit._packed_forward._cache_size()
    sizes = [(8 * rows, 8 * columns) for rows in range(1, 6) for columns in range(1, 6)]
    vit.features(random_images(sizes))
    assert vit._packed_forward._cache_size() - before <= 6  # for 25 sizes


def test_order_is_kept_over_many_batches(vit, monkeypatch):
    monkeypatch.setattr(features, "BATCH_TOKENS", 8)
    images = random_images([(8, 8), (16, 16)] * 30)
    expected = [vit.features([image])[0] for image in images]
    np.testing.assert_allclose(vit.features(iter(images)), expected, atol=1e-5)


def test_a_stack_is_a_sequence(vit):
    stack = np.stack(random_images([(32, 32)] * 3))
    np.testing.assert_allclose(vit.features(stack), vit.features(list(stack)), atol=1e-6)
    np.testing.assert_allclose(vit.features(jnp.asarray(stack)), vit.features(stack), atol=1e-6)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", [(32, 32), (64, 97), (33, 45), (150, 140)]),
        ("small_stem", [(32, 32), (64, 40), (9, 31)]),
        ("xcit_small_12", [(32, 32), (72, 40), (16, 24), (72, 72)]),
    ],
)
def test_other_backbones(name, sizes):
    model = model_of(name, jax.devices()[:2])
    images = random_images(sizes)
    cls = model.features(images)
    variables = jax.device_get(model.variables)
    for i, image in enumerate(images):
        expected = jax.jit(model.backbone.apply)(variables, image[None])
        np.testing.assert_allclose(cls[i], expected[0], atol=1e-5)
    if name.startswith("xcit"):
        _, patches = model.features(images, patches=True)
        for image, tokens in zip(images, patches, strict=True):
            assert tokens.shape == (image.shape[0] // 8, image.shape[1] // 8, 32)
            np.testing.assert_allclose(tokens, alone(model, image)[1], atol=1e-5)
    else:
        with pytest.raises(UserError, match="no tokens"):
            model.features(images, patches=True)


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_preprocess(vit, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    expected = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    (tmp_path / "a.png").write_bytes(png(pixels))
    for form in (pixels, png(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        image = vit.preprocess(form)
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, expected, atol=1e-6)
    assert vit.preprocess(pixels, resize=16, crop=8).shape == (8, 8, 3)
    assert vit.preprocess(pixels, resize=16).shape == (16, 24, 3)
    np.testing.assert_allclose(vit.features([pixels]), vit.features([expected]), atol=1e-5)
    (tmp_path / "bad.png").write_bytes(b"no image")
    for path in (tmp_path / "bad.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            vit.preprocess(path)


def test_wrong_input_is_said(vit):
    for images, words in (
        ([], "no images"),
        ([np.zeros((8, 8, 4), np.float32)], "8, 8, 4"),
        (random_images([(4, 9)]), ">= 8"),
    ):
        with pytest.raises(UserError, match=words):
            vit.features(images)


def test_a_weight_file_in_five_lines(load_reference, tmp_path):
    data = load_reference("vit.npz")
    write_pth(tmp_path / "w.pth", {k[6:]: v.astype(np.float32) for k, v in data.items() if k.startswith("param/")})
    model = load(tmp_path / "w.pth", heads=3)
    for size in ("32x32", "16x16", "24x40"):
        images = data[f"in/{size}"].transpose(0, 2, 3, 1).astype(np.float32)
        cls, patches = model.features(images, patches=True)
        np.testing.assert_allclose(cls, data[f"cls/{size}"], atol=1e-5)
        np.testing.assert_allclose(np.stack(patches).reshape(2, -1, 24), data[f"layer2/{size}"][:, 1:], atol=1e-5)


def test_the_verb_writes_a_file(load_reference, tmp_path, caplog):
    data = load_reference("vit.npz")
    write_pth(tmp_path / "w.pth", {k[6:]: v.astype(np.float32) for k, v in data.items() if k.startswith("param/")})
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i, size in enumerate([(32, 32), (24, 40)]):
            (folder / label / f"{i}.png").write_bytes(png(rng.integers(0, 256, (*size, 3), np.uint8)))
    (folder / "dog" / "broken.png").write_bytes(b"no image")
    (folder / "dog" / "tiny.png").write_bytes(png(np.zeros((5, 5, 3), np.uint8)))  # less than a patch
    options = {"heads": 3, "patches": True, "progress": False}
    count = write_features(tmp_path / "w.pth", str(folder), tmp_path / "out" / "f.npz", **options)
    assert count == {"images": 4, "unreadable": 2}
    assert [name in caplog.text for name in ("dog/broken.png: ", "dog/tiny.png: ")] == [True, True]
    for images, number in ((folder / "cat" / "0.png", 1), (folder / "cat" / "*.png", 2)):
        count = write_features(tmp_path / "w.pth", str(images), tmp_path / "few.npz", heads=3, progress=False)
        assert count == {"images": number, "unreadable": 0}
    model = load(tmp_path / "w.pth", heads=3)
    with np.load(tmp_path / "out" / "f.npz") as file:
        assert file["labels"].tolist() == [0, 0, 1, 1]
        assert file["grids"].tolist() == [[4, 4], [3, 5]] * 2
        assert file["patches"].shape == (2 * (16 + 15), 24)
        paths = [folder / label / f"{i}.png" for label in ("cat", "dog") for i in range(2)]
        np.testing.assert_allclose(file["features"], model.features([str(path) for path in paths]), atol=1e-5)
        assert all(name.endswith(path.name) for name, path in zip(file["names"], paths, strict=True))
    write_features(tmp_path / "w.pth", str(folder), tmp_path / "g.npz", resize=40, crop=24, **options)
    with np.load(tmp_path / "g.npz") as file:
        assert file["grids"].tolist() == [[3, 3]] * 5  # resized, the tiny image is large enough


def test_an_output_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "f.npz", "/proc/nowhere/f.npz"):
        with pytest.raises(UserError, match=rf"^--out={out}: cannot be written"):
            write_features("absent", "absent", out)


def forms():
    """PIL images of many kinds by name: mode, transparency, EXIF, 16 bits."""
    rng = np.random.default_rng(5)
    color = Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8))
    palette = color.quantize(16)
    palette.info["transparency"] = 3
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = color.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (16, 24), np.uint8)))
    return {
        "color.png": (color, {}),
        "gray.png": (color.convert("L"), {}),
        "gray alpha.png": (alpha.convert("LA"), {}),
        "binary.png": (color.convert("1"), {}),
        "alpha.png": (alpha, {}),
        "palette.png": (palette, {"transparency": 3}),
        "sixteen.png": (Image.fromarray(rng.integers(0, 65536, (16, 24), np.uint16)), {}),
        "float.tif": (Image.fromarray(rng.random((16, 24), np.float32)), {}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "turned.jpg": (color, {"exif": turned}),
        "turned.png": (color, {"exif": turned}),
        "lossy.jpg": (color, {}),
        "indexed.gif": (color.quantize(8), {}),
    }


@pytest.mark.parametrize("name", forms())
def test_a_pil_image_is_what_its_file_is(vit, name, tmp_path):
    image, options = forms()[name]
    image.save(tmp_path / name, **options)
    expected = vit.preprocess(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        np.testing.assert_array_equal(vit.preprocess(opened), expected)
    with Image.open(tmp_path / name) as opened:
        opened.load()
        np.testing.assert_array_equal(vit.preprocess(opened.copy()), expected)
    if name.endswith(".png") and "turned" not in name:
        np.testing.assert_array_equal(vit.preprocess(image), expected)
    assert vit.preprocess(tmp_path / name, resize=8).shape == ((12, 8, 3) if "turned" in name else (8, 12, 3))


def test_images_of_any_form_and_size_are_features(vit, monkeypatch):
    monkeypatch.setattr(type(vit), "_run", lambda self, inputs, patches: (np.zeros((len(inputs), 4)), None))
    images = [Image.new("P", (16, 24)), np.zeros((8, 8), np.uint8), np.zeros((9, 30, 1), bool), np.ones((8, 8, 3))]
    assert vit.features([*images, jax.numpy.zeros((8, 8, 3), np.uint8), png(np.zeros((8, 8, 3), np.uint8))]).shape == (
        6,
        4,
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", "one image where a list of images is expected"),
        (Image.new("L", (8, 8)), "one image where a list of images is expected"),
        (np.zeros((8, 8, 3)), "one image where a list of images is expected"),
        ([None], r"an image \(NoneType\): "),
        ([3], r"an image \(int\): "),
        ([{}], r"an image \(dict\): "),
        ([np.zeros((8, 8, 3), np.int64)], "pixels of type int64 are not supported"),
        ([np.zeros((8, 8, 3), object)], "pixels of type object are not supported"),
        ([np.full((8, 8, 3), 200.0)], "values up to 200: it is taken as normalized"),
        ([np.full((8, 8, 3), np.nan)], "values up to nan"),
        ([Image.new("RGB", (0, 8))], "has no pixels"),
        (["a\0b"], "a\\\\x00b: "),
    ],
)
def test_what_is_no_image_is_said(vit, images, message):
    with pytest.raises(UserError, match=message):
        vit.features(images)


@pytest.mark.parametrize("options", [{"resize": -1}, {"crop": -5}, {"crop": (8, -8)}, {"crop": (8,)}, {"resize": 1.5}])
def test_sizes_that_are_none(vit, options):
    with pytest.raises(UserError, match="sizes in pixels are needed"):
        vit.preprocess(np.zeros((8, 8, 3), np.uint8), **options)


def test_an_output_that_is_no_file_is_named_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    for out, message in (
        (tmp_path / "folder", "this is a folder: name a file in it"),
        (f"{tmp_path}/new/", "this is a folder"),
        (tmp_path / "f.csv", "features are written as .npz"),
        ("/dev/null", "not a regular file, which would be replaced"),
    ):
        with pytest.raises(UserError, match=f"^--out={out}: .*{message}"):
            write_features("absent", "absent", out)


def test_every_unreadable_image_is_named_and_none_readable_is_an_error(vit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(features, "load", lambda *_, **__: vit)
    monkeypatch.setattr(type(vit), "_run", lambda self, inputs, patches: (np.zeros((len(inputs), 4)), None))
    for number in range(309):
        (tmp_path / f"{number:03d}\n.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 309 images can be read, first .*000\\n\.png: "):
        write_features("c", str(tmp_path), tmp_path.parent / "f.npz", progress=False)
    (tmp_path / "good.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    count = write_features("c", str(tmp_path), tmp_path.parent / "f.npz", progress=False)
    assert count == {"images": 1, "unreadable": 309}
    with np.load(tmp_path.parent / "f.npz") as file:
        lines = file["unreadable"].tolist()
    assert len(lines) == 309 and all(line.startswith(f"{i:03d}\\n.png: not an image") for i, line in enumerate(lines))
    assert all(f"skipped: {number:03d}\\n.png: " in caplog.text for number in range(309))
