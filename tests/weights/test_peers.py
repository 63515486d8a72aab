"""Exports load strictly into timm, transformers, torchvision and compute the same there; their files import here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.models import build_backbone
from dino_jax.training.loop import train
from dino_jax.training.start import write_checkpoint
from dino_jax.weights import importer
from dino_jax.weights.exporter import backbone_tensors, export_weights, part
from dino_jax.weights.importer import Weights
from dino_jax.weights.load import open_weights
from tests.models.torch_names import sequence
from tests.peers import peer
from tests.tiny import tiny_config
from tests.weights.test_exporter import random_weights

pytestmark = pytest.mark.extra


def ours(weights: Weights, images: np.ndarray, method=None) -> np.ndarray:
    """Our output for images [B, c, h, w], or that of a method."""
    backbone = build_backbone(weights.config.model, weights.config.crops.global_size)
    apply = jax.jit(lambda variables, x: backbone.apply(variables, x, method=method))
    return np.asarray(apply(part(weights.teacher, "backbone"), jnp.asarray(images.transpose(0, 2, 3, 1))))


def all_tokens(backbone, x):
    """The last block's tokens in the network's order, [B, N, D]."""
    return sequence(backbone.tokens(x))[0]


def images(size=(32, 32), batch=2):
    return np.random.default_rng(3).normal(size=(batch, 3, *size)).astype(np.float32)


def timm_vit(**options):
    return peer("timm.models.vision_transformer").VisionTransformer(
        num_classes=0,
        global_pool="token",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | options,
    )


def timm_xcit():
    return peer("timm.models.xcit").Xcit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, eta=1.0, tokens_norm=True, num_classes=0
    )


def randomise(torch, model):
    """Random numbers in every tensor, running variances positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.1, generator=generator)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


PEERS = {
    "timm ViT": timm_vit,
    "timm XCiT": timm_xcit,
    "torchvision ResNet-18": lambda: headless(peer("torchvision.models").resnet18()),
    "torchvision ResNet-50": lambda: headless(peer("torchvision.models").resnet50()),
}


def headless(resnet):
    resnet.fc = peer("torch.nn").Identity()
    return resnet


def test_registers_are_timm_s(tmp_path):
    """timm has the position of CLS inside of its token: the same function; its own tensors come back as they were."""
    torch = peer("torch")
    model = randomise(torch, timm_vit(reg_tokens=4, no_embed_class=True))
    with torch.no_grad():
        expected = model(torch.from_numpy(images())).numpy()
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    weights = importer.read(tmp_path / "theirs.pth", heads=3)
    assert weights.config.model.registers == 4
    np.testing.assert_allclose(ours(weights, images()), expected, atol=1e-4)

    weights = random_weights("vit_tiny", registers=4)  # CLS has a position of its own here
    path = export_weights(write_checkpoint(weights, tmp_path / "run"), tmp_path / "ours.safetensors", format="timm")
    tensors = peer("safetensors.torch").load_file(path)
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        last = model.forward_features(torch.from_numpy(images())).numpy()  # [B, 1 + 4 + N, D]
    backbone = build_backbone(weights.config.model, (32, 32))
    variables, pixels = part(weights.teacher, "backbone"), images().transpose(0, 2, 3, 1)
    tokens = backbone.apply(variables, pixels, method="tokens")
    np.testing.assert_allclose(tokens.cls[0], last[:, 0], atol=1e-4)
    np.testing.assert_allclose(tokens.registers[0], last[:, 1:5], atol=1e-4)
    np.testing.assert_allclose(tokens.flat_patches[0], last[:, 5:], atol=1e-4)
    again = importer.read(path, heads=3)
    np.testing.assert_allclose(ours(again, images()), tokens.cls[0], atol=1e-6)
    back = backbone_tensors(again, "timm")
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)


@pytest.mark.parametrize("name", PEERS)
def test_their_weights_are_the_same_function_here_and_go_back(tmp_path, name):
    torch = peer("torch")
    model = randomise(torch, PEERS[name]())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = importer.read(tmp_path / "weights.pth", heads=3 if "ViT" in name else None)
    with torch.no_grad():
        expected = model(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(ours(weights, images()), expected, atol=1e-4 * max(1, np.abs(expected).max()))

    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    randomise(torch, model)
    exported = backbone_tensors(weights, "timm")
    model.load_state_dict({key: torch.from_numpy(value) for key, value in exported.items()}, strict=True)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[key], err_msg=key)


def test_torchvision_classifier_is_left_out(tmp_path, caplog):
    torch = peer("torch")
    torch.save(peer("torchvision.models").resnet18().state_dict(), tmp_path / "weights.pth")
    with caplog.at_level("INFO"):
        weights = importer.read(tmp_path / "weights.pth")
    assert weights.config.model.name == "resnet18"
    assert "fc.weight" in caplog.text


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_run_exports_to_timm(tmp_path, suffix):
    torch, safe = peer("torch"), peer("safetensors.torch")
    weights = random_weights("vit_tiny", head=True)
    write_checkpoint(weights, tmp_path / "run")
    path = export_weights(tmp_path / "run", tmp_path / f"timm.{suffix}", format="timm")
    state = safe.load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    model = timm_vit()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        features = model.eval()(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(ours(weights, images()), features, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run of four real steps, and its teacher."""
    config = tiny_config()
    config.epochs = 1
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir, open_weights(workdir)


def test_a_trained_run_loads_strictly_into_timm(trained, tmp_path):
    torch, safe = peer("torch"), peer("safetensors.torch")
    workdir, weights = trained
    path = export_weights(workdir, tmp_path / "timm.safetensors", format="timm")
    model = timm_vit(embed_dim=32, num_heads=2).eval()
    model.load_state_dict(safe.load_file(path), strict=True)
    with torch.no_grad():
        features = model(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(ours(weights, images()), features, atol=1e-4)


def test_a_trained_run_loads_strictly_into_transformers(trained, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    workdir, weights = trained
    export_weights(workdir, tmp_path / "hf", format="hf")
    model, info = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        tokens = model.eval()(torch.from_numpy(images())).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(weights, images(), all_tokens), tokens, atol=1e-4)


def test_a_whole_model_loads_into_timm_by_its_name(tmp_path):
    torch, timm = peer("torch"), peer("timm")
    source = timm.create_model("vit_small_patch16_224.dino", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    weights = importer.read(tmp_path / "timm.pth")
    assert (weights.config.model.name, weights.config.model.heads) == ("vit_small", None)
    export_weights(tmp_path / "timm.pth", tmp_path / "out.safetensors", format="timm")
    again = timm.create_model("vit_small_patch16_224.dino", checkpoint_path=str(tmp_path / "out.safetensors"))
    for key, value in source.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_run_exports_to_transformers(tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    weights = random_weights("vit_tiny", head=True)
    write_checkpoint(weights, tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "hf", format="hf")
    model, info = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(images()), output_attentions=True)
    tokens = output.last_hidden_state.numpy()
    np.testing.assert_allclose(ours(weights, images(), all_tokens), tokens, atol=1e-4)
    np.testing.assert_allclose(ours(weights, images(), "attention"), output.attentions[-1].numpy(), atol=1e-4)

    model.save_pretrained(tmp_path / "saved")
    again = importer.read(tmp_path / "saved")  # with the heads of its config.json
    same = jax.tree.map(np.array_equal, again.teacher["params"]["backbone"], weights.teacher["params"]["backbone"])
    assert jax.tree.all(same)


def test_the_official_export_loads_into_torch(tmp_path):
    """What the official `load_pretrained_weights` and `restart_from_checkpoint` do, on modules of the same names."""
    torch = peer("torch")
    weights = random_weights("vit_tiny", head=True, norm_last_layer=False)
    write_checkpoint(weights, tmp_path / "run")
    path = export_weights(tmp_path / "run", tmp_path / "official.pth", format="official")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    backbone = {k.removeprefix("backbone."): v for k, v in checkpoint["teacher"].items() if k.startswith("backbone.")}
    timm_vit().load_state_dict(backbone, strict=True)
    nn = torch.nn
    mlp = nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 12))
    last = nn.utils.weight_norm(nn.Linear(12, 16, bias=False))
    student = {k.removeprefix("module.head."): v for k, v in checkpoint["student"].items() if ".head." in k}
    head = nn.ModuleDict({"mlp": mlp, "last_layer": last})
    head.load_state_dict(student, strict=True)
    assert checkpoint["dino_loss"]["center"].shape == (1, 16)
