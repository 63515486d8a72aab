"""Optimizers against closed forms in NumPy and, where it is installed, torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dino_jax.errors import UserError
from dino_jax.training import optim
from dino_jax.training.schedules import Schedules
from tests.tiny import tiny_config

LR = [0.1, 0.2, 0.4, 0.3, 0.2, 0.1]
DECAY = [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]


def table(values):
    return lambda step: jnp.asarray(values)[step]


SCHEDULES = Schedules(table(LR), table(DECAY), table(LR), table(LR), table(LR))


def parameters(rng):
    return {
        "backbone": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "head": {"last_layer": {"v": rng.normal(size=(5, 4)), "g": rng.normal(size=(5, 1))}},
    }


def run(config, steps, freeze=0):
    """Parameters after each step on random gradients, and the gradients, in double precision."""
    rng = np.random.default_rng(0)
    params = parameters(rng)
    config.optim.freeze_last_layer = freeze
    optimizer = optim.make_optimizer(config, SCHEDULES, 1)
    state, history, grads = optimizer.init(params), [params], []
    for step in range(steps):
        grads.append(parameters(rng))
        updates, state = optimizer.update(grads[-1], state, history[-1], step=step)
        history.append(optax.apply_updates(history[-1], updates))
    return history, grads


def leaves(tree):
    return {
        "kernel": np.asarray(tree["backbone"]["kernel"]),
        "bias": np.asarray(tree["backbone"]["bias"]),
        "v": np.asarray(tree["head"]["last_layer"]["v"]),
        "g": np.asarray(tree["head"]["last_layer"]["g"]),
    }


def numpy_trajectory(name, history, grads, freeze, b1=0.9, b2=0.999, eps=1e-8, momentum=0.9):
    """The recipe, tensor by tensor, written out."""
    params = leaves(history[0])
    memory = {key: {"m": 0.0, "v": 0.0, "t": 0} for key in params}
    for step, grad in enumerate(map(leaves, grads)):
        for key, p in params.items():
            if key in ("v", "g") and step < freeze:
                continue
            decay = DECAY[step] if p.ndim > 1 else 0.0
            own, g = memory[key], grad[key]
            if name == "adamw":
                own["t"] += 1
                own["m"] = b1 * own["m"] + (1 - b1) * g
                own["v"] = b2 * own["v"] + (1 - b2) * g**2
                direction = (own["m"] / (1 - b1 ** own["t"])) / (np.sqrt(own["v"] / (1 - b2 ** own["t"])) + eps)
                params[key] = p * (1 - LR[step] * decay) - LR[step] * direction
                continue
            g = g + decay * p
            if name == "lars" and p.ndim > 1:
                g = g * 0.001 * np.linalg.norm(p) / np.linalg.norm(g)
            own["m"] = momentum * own["m"] + g
            params[key] = p - LR[step] * own["m"]
    return params


@pytest.mark.parametrize("freeze", [0, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_closed_form(x64, name, freeze):
    config = tiny_config()
    config.optim.update({"name": name, "clip_grad": 0.0})
    history, grads = run(config, 6, freeze)
    expected = numpy_trajectory(name, history, grads, freeze)
    for key, value in leaves(history[-1]).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-10, atol=1e-12, err_msg=key)


def test_clipping_is_per_tensor(x64):
    grads = {"small": jnp.array([0.3, 0.4]), "large": jnp.array([[30.0, 40.0]])}
    clip = optim.clip_gradient(3.0, "tensor")
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(clipped["small"], grads["small"])
    np.testing.assert_allclose(clipped["large"], np.array([[30.0, 40.0]]) * 3 / (50 + 1e-6), rtol=1e-12)


def test_clipping_by_module(x64):
    """Torch's `clip_grad_norm_` over each module."""
    grads = {
        "backbone": {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])},
        "head": {"last_layer": {"v": jnp.array([[0.3, 0.4]])}},
    }
    clip = optim.clip_gradient(3.0, "module")
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["backbone"]["a"], np.array([3.0, 4.0]) * 3 / (13 + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(clipped["backbone"]["b"], [[12.0 * 3 / (13 + 1e-6)]], rtol=1e-12)
    np.testing.assert_array_equal(clipped["head"]["last_layer"]["v"], grads["head"]["last_layer"]["v"])


def test_prototypes_frozen_by_their_learning_rate_collect_moments(x64):
    config = tiny_config()
    config.optim.update({"clip_grad": 0.0, "freeze_by": "lr"})
    history, grads = run(config, 6, freeze=2)
    for frozen in history[1:3]:
        np.testing.assert_array_equal(leaves(frozen)["v"], leaves(history[0])["v"])
    m, v = moments_of_prototypes(grads)[2]  # of all three steps
    before = leaves(history[2])["v"]
    expected = -LR[2] * (m / (np.sqrt(v) + config.optim.eps) + DECAY[2] * before)
    np.testing.assert_allclose(leaves(history[3])["v"] - before, expected, rtol=1e-9)


def moments_of_prototypes(grads, b1=0.9, b2=0.999):
    """Adam's corrected moments after each step."""
    m, v, found = 0.0, 0.0, []
    for t, grad in enumerate((leaves(g)["v"] for g in grads), 1):
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        found.append((m / (1 - b1**t), v / (1 - b2**t)))
    return found


def test_factors_scale_the_learning_rate(x64):
    config = tiny_config()
    config.optim.clip_grad = 0.0
    rng = np.random.default_rng(0)

    def draw():
        blocks = {f"blocks_{i}": {"kernel": rng.normal(size=(2, 2))} for i in range(2)}
        embed = {"patch_embed": {"kernel": rng.normal(size=(2, 2))}, "cls_token": rng.normal(size=(1, 1, 2))}
        return {"backbone": embed | blocks | {"norm": {"scale": rng.normal(size=2)}}, "head": {"a": rng.normal(size=2)}}

    params, grads = draw(), draw()

    def moved(layer_decay, patch_embed_lr):
        config.optim.update({"layer_decay": layer_decay, "patch_embed_lr": patch_embed_lr})
        optimizer = optim.make_optimizer(config, SCHEDULES, 1)
        return optimizer.update(grads, optimizer.init(params), params, step=0)[0]

    ratios = jax.tree.map(lambda a, b: float(np.mean(a / b)), moved(0.5, 0.2), moved(1.0, 1.0))
    factors = {"patch_embed": {"kernel": 0.2 * 0.125}, "cls_token": 0.125, "norm": {"scale": 1.0}}
    factors |= {"blocks_0": {"kernel": 0.25}, "blocks_1": {"kernel": 0.5}}
    expected = {"backbone": factors, "head": {"a": 1.0}}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ratios, expected)


def test_unknown_optimizer_is_named():
    config = tiny_config()
    config.optim.name = "adam"
    with pytest.raises(UserError, match=r"optim\.name='adam'"):
        optim.make_optimizer(config, SCHEDULES, 1)


@pytest.mark.extra
def test_adamw_equals_torch(x64):
    torch = pytest.importorskip("torch")
    config = tiny_config()
    config.optim.clip_grad = 0.0
    history, grads = run(config, 6)
    tensors = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in leaves(history[0]).items()}
    plain = [t for t in tensors.values() if t.ndim == 1]
    theirs = torch.optim.AdamW([{"params": [t for t in tensors.values() if t.ndim > 1]}, {"params": plain}])
    for step, grad in enumerate(map(leaves, grads)):
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(grad[key])
        for group, decay in zip(theirs.param_groups, (DECAY[step], 0.0), strict=True):
            group.update(lr=LR[step], weight_decay=decay)
        theirs.step()
    for key, value in leaves(history[-1]).items():
        np.testing.assert_allclose(value, tensors[key].detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=key)
