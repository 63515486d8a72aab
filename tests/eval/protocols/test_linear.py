from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.config import default
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval import batches as training
from dino_jax.eval.batches import crop_and_flip, data_mesh, train_batches
from dino_jax.eval.protocols import linear
from dino_jax.eval.splits import class_count, open_splits
from dino_jax.inference.model import Model
from dino_jax.models import BACKBONES
from dino_jax.parallel.sharding import make_mesh
from dino_jax.weights.pth import write_pth


def small(epochs=3):
    config = linear.PROTOCOL.default_config()
    config.features, config.lrs, config.epochs = ("2", "1+avg"), (0.01, 1.0), epochs
    config.resize, config.crop, config.batch_size, config.threads = 16, 16, 16, 2
    return config


def test_protocol_reports_every_head_and_the_rule(vit, class_folders):
    figures = linear.evaluate(vit, str(class_folders), small())
    names = [f"{choice} lr={lr:g}" for choice in ("2", "1+avg") for lr in (0.01, 1.0)]
    assert {f"top1_{name}" for name in names} <= set(figures) and figures["head"] in names
    assert figures["top1"] == max(figures[f"top1_{name}"] for name in names) > 80
    assert "official" in figures["selection"]
    config = small()
    config.holdout = 0.25
    assert "held-out" in linear.evaluate(vit, str(class_folders), config)["selection"]


def test_a_broken_off_run_goes_on_to_the_same_end(vit, class_folders, tmp_path, monkeypatch):
    whole = linear.evaluate(vit, str(class_folders), small(), workdir=str(tmp_path / "whole"))
    train = linear._train_epoch

    def stop(*args):
        if args[3] == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(linear, "_train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        linear.evaluate(vit, str(class_folders), small(), workdir=str(tmp_path / "part"))
    done = []
    monkeypatch.setattr(linear, "_train_epoch", lambda *args: done.append(args[3]) or train(*args))
    assert linear.evaluate(vit, str(class_folders), small(), workdir=str(tmp_path / "part")) == whole
    assert done == [2]
    saved = [dict(np.load(next((tmp_path / name).glob("linear-*.npz")))) for name in ("whole", "part")]
    for key in saved[0]:
        np.testing.assert_array_equal(saved[0][key], saved[1][key])


def test_one_device_equals_eight(vit, class_folders, monkeypatch):
    config = small(1)
    config.batch_size, config.lrs, config.features = 10, (0.01,), ("1",)  # 10 is padded to 16 on eight devices
    trained = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1}, devices)
        monkeypatch.setattr(linear, "data_mesh", lambda mesh=mesh: mesh)
        source = open_source(str(class_folders / "train"))
        heads, _ = linear._train_epoch(vit, source, config, 0, *linear._init(vit, config, 3))
        assert len(heads["1"]["bias"].sharding.device_set) == len(devices)
        trained.append((jax.device_get(heads), linear.score(vit, source, heads, config)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *trained)


@pytest.mark.extra
def test_a_step_is_the_sgd_of_torch(vit):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(3, size=8).astype(np.int32)
    config = small()
    config.features = ("2",)
    heads, momentum = linear._init(vit, config, 3)
    inputs = np.asarray(linear._inputs(vit.forward, ("2",), vit.variables, images)["2"])
    peers = []
    for lr in (0.01, 1.0):
        layer = torch.nn.Linear(inputs.shape[1], 3)
        with torch.no_grad():
            layer.weight[:] = torch.tensor(heads["2"]["kernel"][0].T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(torch.tensor(inputs)), torch.tensor(labels).long()).backward()
            optimizer.step()
        peers.append(layer)
    # two rows of padding must not count
    filled = {
        "image": np.concatenate([images, images[:2]]),
        "label": np.append(labels, [0, -1]),
        "valid": np.arange(10) < 8,
    }
    for _ in range(3):
        heads, momentum = linear._train_step(
            vit.forward, vit.variables, heads, momentum, filled, np.array([0.01, 1.0], np.float32)
        )
    for i, layer in enumerate(peers):
        np.testing.assert_allclose(heads["2"]["kernel"][i].T, layer.weight.detach().numpy(), atol=2e-4)
        np.testing.assert_allclose(heads["2"]["bias"][i], layer.bias.detach().numpy(), atol=2e-4)


def test_released_heads_are_read_and_fitted_by_their_width(vit, class_folders, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(3, 32)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    write_pth(tmp_path / "head.pth", {"epoch": 100, "state_dict": state, "best_acc": 77.0})
    config = small()
    config.head = str(tmp_path / "head.pth")
    with pytest.raises(UserError, match="fit 2 of the choices"):  # 2 CLS, or CLS and mean: both have width 32
        linear.evaluate(vit, str(class_folders), config)
    config.features = ("2",)
    figures = linear.evaluate(vit, str(class_folders), config)
    monkeypatch.setattr(linear, "fetch", lambda name, head: {"dino_vits16": tmp_path / "head.pth"}[name])
    config.head = "dino_vits16"  # by the released model's name
    assert linear.evaluate(vit, str(class_folders), config) == figures
    config.head = str(tmp_path / "head.pth")
    assert figures["selection"] == "released head" and 0 <= figures["top1"] <= figures["top5"] == 100
    write_pth(tmp_path / "head.pth", {"state_dict": {"fc.weight": weight}})
    with pytest.raises(UserError, match="not a linear head"):
        linear.evaluate(vit, str(class_folders), config)


def test_choices(vit):
    config = linear.PROTOCOL.default_config()
    for name, wanted in {
        "vit_base": ("4", "1+avg"),
        "resnet50": ("1",),
        "xcit_small_12": ("1", "1+avg"),
    }.items():
        model = Model(default(), {}, BACKBONES[name]())
        assert linear.choices(model, config) == wanted
    assert linear.choices(vit, config) == ("2", "1+avg")  # it has two blocks
    config.features = ("1",)
    assert linear.choices(vit, config) == ("1",)
    assert linear.parse_choice("4") == (4, False) and linear.parse_choice("1+avg") == (1, True)
    with pytest.raises(UserError, match="1\\+avg"):
        linear.parse_choice("avg")


def test_hits_count_ranks_and_only_valid_rows():
    logits = np.zeros((1, 4, 8), np.float32) + np.arange(8)
    found = linear.hits(logits, np.array([7, 3, 2, 7]), np.array([True, True, True, False]))
    np.testing.assert_array_equal(found, [[1], [2]])


def test_batches_are_the_same_on_any_number_of_threads_and_skip_broken_files(class_folders):
    (class_folders / "train" / "n01" / "n01_3.JPEG").write_bytes(b"broken")
    source = open_source(str(class_folders / "train"))

    def epoch(number, threads):
        batches = train_batches(
            source,
            lambda pixels, rng: crop_and_flip(pixels, rng, 8),
            data_mesh(),
            batch_size=10,
            seed=0,
            epoch=number,
            channels=3,
            threads=threads,
        )
        return [jax.device_get(batch) for batch in batches]

    one, four, other = epoch(0, 1), epoch(0, 4), epoch(1, 4)
    for a, b in zip(one, four, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert sum(int(batch["valid"].sum()) for batch in one) == 23
    assert not np.array_equal(one[0]["image"], other[0]["image"])
    assert one[0]["image"].shape == (16, 8, 8, 3)  # 10 padded to a multiple of 8 devices


def test_too_many_unreadable_test_images_are_an_error(class_folders):
    (class_folders / "val" / "n01" / "n01_3.JPEG").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"test images: 1 of 12 images cannot be read, first n01/n01_3\.JPEG"):
        list(training.test_batches(open_source(str(class_folders / "val")), small(), data_mesh(), 3))


def test_classes_of_the_splits_must_agree(class_folders):
    train, val = (open_source(str(class_folders / split)) for split in ("train", "val"))
    assert class_count(train, val, "x") == 3
    (class_folders / "val" / "n02").rename(class_folders / "val" / "n04")
    with pytest.raises(UserError, match="1 test classes have no training images, first class n04"):
        open_splits(str(class_folders))
    flat = class_folders / "flat"
    flat.mkdir()
    Image.new("RGB", (4, 4)).save(flat / "a.png")
    with pytest.raises(UserError, match="no labels"):
        class_count(train, open_source(str(flat)), "x")
