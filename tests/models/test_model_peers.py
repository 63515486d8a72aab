"""Backbones equal those of timm, transformers and torchvision with the same random weights."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from dino_jax.models import BACKBONES, resize_pos_embed
from tests.models.torch_names import sequence, to_variables
from tests.peers import peer

pytestmark = pytest.mark.extra

_HUGGING_FACE = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^layers\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"^layernorm\.", "norm."),
)


def shake(model) -> None:
    """Adds noise to every tensor, so that a swapped or forgotten one shows even where all start equal."""
    torch = peer("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.mul_(1 + 0.3 * noise.clamp(-2, 2))
            elif tensor.is_floating_point():
                tensor.add_(0.02 * noise)


def arrays_of(model) -> dict[str, np.ndarray]:
    """A copy of the state dict, with separate queries, keys and values joined as in the official layout."""
    state = {name: np.array(tensor) for name, tensor in model.state_dict().items()}
    for name in [name for name in state if re.search(r"\.attn\.q\.", name)]:
        parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        state[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
    return state


def random_images(height: int, width: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, height, width, 3), np.float32)


def as_torch(images: np.ndarray):
    return peer("torch").from_numpy(images.transpose(0, 3, 1, 2).copy())


def official_size(state: dict[str, np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    return np.array(resize_pos_embed(state["pos_embed"], grid))


def assert_close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=1e-4)


def tokens_and_attention(model, variables, images):
    """Tokens and attention of the last block, compiled together so that the other blocks run once."""

    def both(variables, images):
        return tuple(model.apply(variables, images, method=method) for method in ("tokens", "attention"))

    tokens, attention = jax.jit(both)(variables, images)
    return sequence(tokens)[0], attention


def timm_last_attention(model, images):
    """Features, and the last block's attention from its queries and keys: timm's fused attention keeps none."""
    caught = []
    last = model.blocks[-1].attn
    handle = last.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
    out = model(images)
    handle.remove()
    batch, tokens, width = caught[0].shape
    query, key, _ = caught[0].reshape(batch, tokens, 3, last.num_heads, -1).permute(2, 0, 3, 1, 4)
    return out, (query @ key.transpose(-2, -1) * (width // 3 // last.num_heads) ** -0.5).softmax(-1)


@pytest.mark.parametrize(
    ("name", "patch", "sizes"),
    [
        ("vit_small", 16, [(224, 224), (480, 480), (224, 320)]),
        ("vit_small", 8, [(224, 224), (480, 240), (96, 160)]),
        ("vit_base", 16, [(224, 224), (480, 480), (320, 224)]),
    ],
)
def test_vit_equals_timm(name, patch, sizes):
    create, torch = peer("timm").create_model, peer("torch")
    official = f"{name}_patch{patch}_224.dino"
    model = create(official, pretrained=False, num_classes=0).eval()
    shake(model)
    state = arrays_of(model)
    ours, variables = BACKBONES[name](patch_size=patch), {"params": to_variables(state)["params"]}
    for height, width in sizes:
        images, grid = random_images(height, width), (height // patch, width // patch)
        resized = create(official, pretrained=False, num_classes=0, img_size=(height, width)).eval()
        resized.load_state_dict(model.state_dict() | {"pos_embed": torch.from_numpy(official_size(state, grid))})
        with torch.no_grad():
            feature, attention = timm_last_attention(resized, as_torch(images))
        tokens, mine = tokens_and_attention(ours, variables, images)
        assert_close(tokens[:, 0], feature)
        assert_close(mine, attention)


@pytest.mark.parametrize(
    ("name", "patch", "height", "width"),
    [
        *[("vit_small", 16, height, width) for height, width in ((224, 224), (480, 480), (320, 224))],
        *[("vit_small", 8, height, width) for height, width in ((224, 224), (96, 160))],
        *[("vit_base", 16, height, width) for height, width in ((224, 224), (480, 480))],
    ],
)
def test_vit_equals_transformers(name, patch, height, width):
    transformers, torch = peer("transformers"), peer("torch")
    ours = BACKBONES[name](patch_size=patch)
    options = {"hidden_size": ours.embed_dim, "num_attention_heads": ours.heads, "patch_size": patch}
    options |= {"intermediate_size": 4 * ours.embed_dim, "layer_norm_eps": 1e-6}

    def create(size):
        config = transformers.ViTConfig(image_size=size, attn_implementation="eager", **options)
        return transformers.ViTModel(config, add_pooling_layer=False).eval()

    model = create((224, 224))
    shake(model)
    state = arrays_of(model)
    for pattern, replacement in _HUGGING_FACE:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        state[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
    variables = {"params": to_variables(state)["params"]}
    resized, images = create((height, width)), random_images(height, width)
    table = torch.from_numpy(official_size(state, (height // patch, width // patch)))
    resized.load_state_dict(model.state_dict() | {"embeddings.position_embeddings": table})
    with torch.no_grad():
        theirs = resized(as_torch(images), output_attentions=True)
    tokens, attention = tokens_and_attention(ours, variables, images)
    assert_close(tokens, theirs.last_hidden_state)
    assert_close(attention, theirs.attentions[-1])


def settle(model, images) -> None:
    """Sets running statistics that fit the weights, so that features in evaluation mode are of order 1."""
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(as_torch(images))
    for norm in norms:
        norm.momentum = 0.1


def check_batch_norm_model(name: str, ours, model, official: dict[str, str], count: int = 2, sizes=()) -> None:
    """Compares features in evaluation (at other `sizes` too) and training, and the batch statistics after it."""
    torch = peer("torch")

    def variables_of():
        state = arrays_of(model)
        for pattern, replacement in official.items():
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        return to_variables(state)

    images = random_images(224, 224, count)
    with torch.no_grad():
        settle(model, images)
    variables = variables_of()
    expected = jax.eval_shape(ours.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, dict(expected)), name
    with torch.no_grad():
        seen = [images, *(random_images(height, width) for height, width in sizes)]
        evaluated = [model.eval()(as_torch(x)) for x in seen]
        trained = model.train()(as_torch(images))
    for x, features in zip(seen, evaluated, strict=True):
        assert_close(ours.apply(variables, x), features)
    out, moved = ours.apply(variables, images, train=True, mutable=["batch_stats"])
    assert_close(out, trained)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(compare, moved["batch_stats"], variables_of()["batch_stats"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(name):
    model = getattr(peer("torchvision.models"), name)()
    model.fc = peer("torch").nn.Identity()
    shake(model)
    check_batch_norm_model(name, BACKBONES[name](), model, {}, sizes=[(480, 480), (224, 320)])


@pytest.mark.parametrize(("name", "patch"), [("xcit_small_12", 16), ("xcit_small_12", 8), ("xcit_medium_24", 16)])
def test_xcit_equals_timm(name, patch):
    model = peer("timm").create_model(f"{name}_p{patch}_224", pretrained=False, num_classes=0)
    shake(model)
    ours = BACKBONES[name](patch_size=patch)
    sizes = [(480, 480), (224, 320)] if (name, patch) == ("xcit_small_12", 16) else [(96, 160)]
    check_batch_norm_model(name, ours, model, {r"^pos_embed\.": "pos_embeder."}, sizes=sizes)
