"""The jitted step against the official `train_one_epoch`, written out crop by crop and tensor by tensor.

Everything that a configuration decides in a step is set to an odd value: two objective terms, a head with batch norm,
drop path, clipping that bites, a frozen last layer, and schedules that move at every step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.parallel import sharding
from dino_jax.training import step as train_step
from tests.tiny import random_crops, tiny_config

PER_EPOCH, EPOCHS = 2, 3
DEPTH, B, C = 3, 4, 3


def odd_config():
    config = tiny_config(depth=DEPTH, drop_path=0.6, dtype="float64")
    config.seed, config.epochs, config.batch_size, config.crops.local_count = 5, EPOCHS, B, C - 2
    config.head.update({"out_dim": 24, "use_bn": True, "norm_last_layer": False})
    config.objective.dino.update({"weight": 0.7, "student_temp": 0.2, "center_momentum": 0.6})
    config.objective.koleo.weight = 0.3
    config.teacher.update({"momentum": 0.7, "momentum_end": 0.9, "temp": 0.09, "warmup_temp": 0.03})
    config.teacher.warmup_temp_epochs = 2
    config.optim.update({"lr": 1.3, "min_lr": 1e-3, "warmup_epochs": 1, "weight_decay": 0.3, "weight_decay_end": 0.05})
    config.optim.update({"clip_grad": 0.05, "freeze_last_layer": 2, "b1": 0.7, "b2": 0.9, "eps": 1e-4})
    return config


def cosine(base, final, warmup_epochs=0):
    """`utils.cosine_scheduler`."""
    warmup = np.linspace(0, base, warmup_epochs * PER_EPOCH) if warmup_epochs else np.array([])
    n = EPOCHS * PER_EPOCH - len(warmup)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(n) / n))])


class Scheduled(NamedTuple):
    lr: np.ndarray
    decay: np.ndarray
    momentum: np.ndarray
    temp: np.ndarray

    @classmethod
    def of(cls, config):
        optim, teacher = config.optim, config.teacher
        temps = np.linspace(teacher.warmup_temp, teacher.temp, teacher.warmup_temp_epochs)
        per_epoch = np.concatenate([temps, np.full(EPOCHS - len(temps), teacher.temp)])
        return cls(
            cosine(optim.lr * B / 256, optim.min_lr, optim.warmup_epochs),
            cosine(optim.weight_decay, optim.weight_decay_end),
            cosine(teacher.momentum, teacher.momentum_end),
            np.repeat(per_epoch, PER_EPOCH),
        )


def outputs(network, params, stats, images, factors):
    """CLS and logits of each of a list of crops [B, h, w, c], one backbone pass each; new statistics of the head."""
    cls = []
    for number, crop in enumerate(images):
        keep = None if factors is None else factors[..., number]
        cls.append(network.backbone.apply({"params": params["backbone"]}, crop, keep, True))
    variables = {"params": params["head"], "batch_stats": stats}
    logits, moved = network.head.apply(variables, jnp.concatenate(cls), True, mutable=["batch_stats"])
    return cls, jnp.split(logits, len(images)), moved["batch_stats"]


def koleo(x):
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    near = jnp.argmax(x @ x.T - 4 * jnp.eye(len(x)), axis=1)
    return -jnp.mean(jnp.log(jnp.linalg.norm(x - x[near] + 1e-8, axis=1) + 1e-8))


def make_gradients(config, network):
    """Loss, gradient, teacher's logits and both networks' new statistics, in the words of the official code."""
    dino = config.objective.dino

    @jax.jit
    def run(student, teacher, center, images, factors, temp):
        _, targets, teacher_stats = outputs(network, *teacher, images[:2], None)
        shares = [jax.nn.softmax((logits - center) / temp) for logits in targets]

        def loss(params):
            cls, logits, stats = outputs(network, params, student[1], images, factors)
            pairs = [
                jnp.mean(jnp.sum(-share * jax.nn.log_softmax(logits[v] / dino.student_temp), axis=-1))
                for iq, share in enumerate(shares)
                for v in range(len(logits))
                if v != iq
            ]
            total = dino.weight * sum(pairs) / len(pairs)
            return total + config.objective.koleo.weight * (koleo(cls[0]) + koleo(cls[1])), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(student[0])
        return value, grads, jnp.concatenate(targets).mean(0), stats, teacher_stats

    return run


def adamw(config, params, grads, memory, step, values):
    """Clips, decays and moves each tensor by name as `torch.optim.AdamW` would; `memory` is changed in place."""
    optim, moved = config.optim, {}
    for name, p in params.items():
        if "last_layer" in name and step < optim.freeze_last_layer * PER_EPOCH:
            moved[name] = p
            continue
        g = grads[name] * min(1.0, optim.clip_grad / (np.linalg.norm(grads[name]) + 1e-6))
        own = memory.setdefault(name, {"m": 0.0, "v": 0.0, "t": 0})
        own["t"] += 1
        own["m"] = optim.b1 * own["m"] + (1 - optim.b1) * g
        own["v"] = optim.b2 * own["v"] + (1 - optim.b2) * g**2
        m, v = own["m"] / (1 - optim.b1 ** own["t"]), own["v"] / (1 - optim.b2 ** own["t"])
        decay = values.decay[step] if p.ndim > 1 else 0.0
        moved[name] = p - values.lr[step] * (decay * p + m / (np.sqrt(v) + optim.eps))
    return moved


def named(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def unnamed(values, like):
    return jax.tree_util.tree_map_with_path(lambda path, _: values[jax.tree_util.keystr(path)], like)


def close(found, expected, what):
    found, expected = named(found), named(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=f"{what} {name}")


def test_six_steps_equal_the_official_loop(x64):
    config = odd_config()
    recipe = train_step.make_recipe(config, PER_EPOCH)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    rng = np.random.default_rng(0)

    def apart(x):  # the teacher is another network from the start, and weights are not all near 0
        return x + rng.normal(0, 0.1, x.shape)

    init = jax.device_get(train_step.jit_init_state(recipe, mesh))
    student, teacher = ({name: apart(x) for name, x in named(init.student["params"]).items()} for _ in range(2))
    place = lambda values: unnamed(values, init.student["params"])  # noqa: E731
    head = {"mean": lambda x: x + rng.normal(0, 0.3, x.shape), "var": lambda x: x + rng.uniform(0, 1, x.shape)}
    odd = lambda tree: {k: {f: head[f](x) for f, x in v.items()} for k, v in tree["head"].items()}  # noqa: E731
    stats, teacher_stats = (odd(init.student["batch_stats"]) for _ in range(2))
    center = rng.normal(0, 0.1, config.head.out_dim)
    salt = 3  # as after three rewinds
    state = init.replace(
        salt=np.int32(salt),
        student={"params": place(student), "batch_stats": {"head": stats}},
        ema=init.ema._replace(teacher=place(teacher)),
        teacher_stats={"head": teacher_stats},
        objectives={**init.objectives, "dino": {"center": center}},
    )
    state = jax.device_put(jax.tree.map(jnp.asarray, state), train_step.shardings(recipe, mesh))
    step = train_step.jit_train_step(recipe, mesh)
    gradients, values, memory = make_gradients(config, recipe.network), Scheduled.of(config), {}
    rates = np.linspace(0, config.model.drop_path, DEPTH)[:, None, None, None]

    for number in range(PER_EPOCH * EPOCHS):
        crops = random_crops(config, seed=number, dtype=np.float64)
        state, metrics = step(state, crops)

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), salt), number)
        factors = jax.random.bernoulli(key, jnp.asarray(1 - rates), (DEPTH, 2, B, C)) / (1 - rates)
        images = [crops[0][:, 0], crops[0][:, 1], crops[1][:, 0]]
        loss, grads, batch_center, stats, teacher_stats = gradients(
            (place(student), stats), (place(teacher), teacher_stats), center, images, factors, values.temp[number]
        )
        grads = named(grads)
        norms = [np.linalg.norm(g) for name, g in grads.items() if "last_layer" not in name]
        assert min(norms) < config.optim.clip_grad < max(norms)  # some are clipped and others not
        student = adamw(config, student, grads, memory, number, values)
        m = values.momentum[number]
        teacher = {name: m * p + (1 - m) * student[name] for name, p in teacher.items()}
        center = 0.6 * center + 0.4 * np.asarray(batch_center)

        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-7)
        for name, value in zip(("lr", "weight_decay", "momentum", "teacher_temp"), values, strict=True):
            np.testing.assert_allclose(metrics[name], value[number], rtol=1e-9, atol=1e-12, err_msg=name)
        close(state.student["params"], place(student), f"step {number}: student")
        close(state.ema.teacher, place(teacher), f"step {number}: teacher")
        close(state.student["batch_stats"]["head"], stats, f"step {number}: student's statistics")
        close(state.teacher_stats["head"], teacher_stats, f"step {number}: teacher's statistics")
        np.testing.assert_allclose(state.objectives["dino"]["center"], center, rtol=1e-7, atol=1e-9)
