"""Optimizers against closed forms in NumPy and, where it is installed, torch."""

from __future__ import annotations

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


SCHEDULES = Schedules(table(LR), table(DECAY), table(LR), table(LR))


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
    clip = optim.clip_per_tensor(3.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(clipped["small"], grads["small"])
    np.testing.assert_allclose(clipped["large"], np.array([[30.0, 40.0]]) * 3 / (50 + 1e-6), rtol=1e-12)


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
