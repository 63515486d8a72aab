"""The optimizers, as chains of optax transforms indexed by the *global* step.

Every `update` takes `step=`, the global step, for the schedules of learning rate and weight decay; the states hold only
moments. So a layer frozen for an epoch keeps empty moments, as in torch, while its schedules move on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.training.schedules import Schedule, Schedules


def decayed(params):
    """Which tensors are decayed: all but the 1-D ones, biases among them. Official: `utils.get_params_groups`."""
    return jax.tree.map(lambda p: p.ndim != 1, params)


def layer_labels(params):
    """`last_layer` for the prototypes (direction and gain), `rest` for everything else."""

    def label(path, _):
        return "last_layer" if any(getattr(k, "key", None) == "last_layer" for k in path) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def clip_per_tensor(max_norm: float) -> optax.GradientTransformation:
    """Each tensor's gradient times min(1, max_norm / (norm + 1e-6)); 0 is off. Official: `utils.clip_gradients`."""

    def clip(g):
        dtype = jnp.promote_types(g.dtype, jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(dtype))))
        return g * jnp.minimum(1.0, max_norm / (norm + 1e-6)).astype(g.dtype)

    if not max_norm:
        return optax.identity()
    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def add_weight_decay(weight_decay: Schedule) -> optax.GradientTransformationExtraArgs:
    """Adds weight_decay(step) times the weight, where `decayed`."""

    def update(updates, state, params, *, step, **_):
        value = weight_decay(step)
        return jax.tree.map(
            lambda u, p, d: u + value.astype(p.dtype) * p if d else u, updates, params, decayed(params)
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_trust_ratio(eta: float = 0.001) -> optax.GradientTransformation:
    """LARS: tensors that are not 1-D are scaled by eta |weight| / |update|, or by 1 where a norm is 0.

    Official: `utils.LARS`.
    """

    def scale(u, p):
        if p.ndim == 1:
            return u
        p_norm, u_norm = jnp.linalg.norm(p), jnp.linalg.norm(u)
        usable = (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, eta * p_norm / jnp.where(usable, u_norm, 1.0), 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))


def hold(inner: optax.GradientTransformationExtraArgs, steps: int) -> optax.GradientTransformationExtraArgs:
    """Before global step `steps`: no update, and `inner`'s state stays as it was, its counts included."""

    def update(updates, state, params, *, step, **extra):
        new_updates, new_state = inner.update(updates, state, params, step=step, **extra)
        live = step >= steps
        return (
            jax.tree.map(lambda u: jnp.where(live, u, jnp.zeros_like(u)), new_updates),
            jax.tree.map(lambda new, old: jnp.where(live, new, old), new_state, state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scale_by_learning_rate(lr: Schedule) -> optax.GradientTransformationExtraArgs:
    """Times -lr(step), after any momentum: the learning rate is never inside an average."""

    def update(updates, state, params=None, *, step, **_):
        value = lr(step)
        return jax.tree.map(lambda u: -value.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: ConfigDict, schedules: Schedules, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The transform of `config.optim`; call `update(grads, state, params, step=global_step)`.

    adamw: decoupled decay, as `torch.optim.AdamW`. sgd: decay joins the gradient, then momentum. lars: decay, trust
    ratio, then momentum. The last layer is held for `freeze_last_layer` epochs (`utils.cancel_gradients_last_layer`).
    """
    optim = config.optim
    decay = add_weight_decay(schedules.weight_decay)
    cores = {
        "adamw": lambda: optax.chain(optax.scale_by_adam(optim.b1, optim.b2, optim.eps), decay),
        "sgd": lambda: optax.chain(decay, optax.trace(optim.momentum)),
        "lars": lambda: optax.chain(decay, scale_by_trust_ratio(), optax.trace(optim.momentum)),
    }
    if optim.name not in cores:
        raise UserError(f"optim.name={optim.name!r} is unknown: choose one of {', '.join(cores)}")
    core = cores[optim.name]()
    by_layer = {"rest": core, "last_layer": hold(core, optim.freeze_last_layer * steps_per_epoch)}
    return optax.chain(
        clip_per_tensor(optim.clip_grad),
        optax.partition(by_layer, layer_labels),
        scale_by_learning_rate(schedules.lr),
    )
