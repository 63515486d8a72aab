"""The optimizers, as chains of optax transforms indexed by the *global* step.

Every `update` takes `step=`, the global step, for the schedules of learning rate and weight decay; the states hold only
moments. So a frozen layer's moments stay empty, as in torch, while its schedules advance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.models.backbone import layers_of
from dino_jax.training.schedules import Schedule, Schedules


def decayed(params):
    """Which tensors get weight decay: all except 1-D ones such as biases. Official: `utils.get_params_groups`."""
    return jax.tree.map(lambda p: p.ndim != 1, params)


def layer_labels(params):
    """`last_layer` for the prototypes (direction and gain), `rest` for everything else."""

    def label(path, _):
        return "last_layer" if any(getattr(k, "key", None) == "last_layer" for k in path) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def clip_gradient(max_norm: float, by: str) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / (norm + 1e-6)); 0 is off.

    `by`: the norm is each tensor's (`tensor`; official: `utils.clip_gradients`), or that of all tensors of the backbone
    or of a head (`module`; DINOv2: `clip_grad_norm_` in `do_train`).
    """

    def clip(tree):
        dtype = jnp.promote_types(jax.tree.leaves(tree)[0].dtype, jnp.float32)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(dtype))) for g in jax.tree.leaves(tree)))
        scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), tree)

    if not max_norm:
        return optax.identity()
    if by == "module":
        return optax.stateless(lambda updates, params: {name: clip(tree) for name, tree in updates.items()})
    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def lr_factors(params: Any, layer_decay: float, patch_embed_lr: float) -> Any:
    """Each parameter's factor on the learning rate.

    In a backbone of L blocks layer_decay^(L + 1 - layer), where 0 is the embeddings' layer, and for the patch embedding
    also `patch_embed_lr`; 1 in the heads. Official: `get_params_groups_with_decay` of DINOv2.
    """
    factors = jax.tree.map(lambda _: 1.0, params)
    layers = layers_of(params["backbone"])
    top = max(jax.tree.leaves(layers))

    def factor(path, layer):
        own = patch_embed_lr if any(getattr(k, "key", None) == "patch_embed" for k in path) else 1.0
        return own * layer_decay ** (top - layer)

    return factors | {"backbone": jax.tree_util.tree_map_with_path(factor, layers)}


def add_weight_decay(weight_decay: Schedule) -> optax.GradientTransformationExtraArgs:
    """Adds weight_decay(step) times the weight to the `decayed` tensors."""

    def update(updates, state, params, *, step, **_):
        value = weight_decay(step)
        return jax.tree.map(
            lambda u, p, d: u + value.astype(p.dtype) * p if d else u, updates, params, decayed(params)
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_trust_ratio(eta: float = 0.001) -> optax.GradientTransformation:
    """LARS: tensors that are not 1-D are scaled by eta |weight| / |update|, or by 1 if a norm is 0.

    Official: `utils.LARS`.
    """

    def scale(u, p):
        if p.ndim == 1:
            return u
        p_norm, u_norm = jnp.linalg.norm(p), jnp.linalg.norm(u)
        usable = (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, eta * p_norm / jnp.where(usable, u_norm, 1.0), 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))


def hold(
    inner: optax.GradientTransformationExtraArgs, steps: int, state_too: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Freezes until global step `steps`: no updates and, with `state_too`, no change of `inner`'s state and counts."""

    def update(updates, state, params, *, step, **extra):
        new_updates, new_state = inner.update(updates, state, params, step=step, **extra)
        live = step >= steps
        new_updates = jax.tree.map(lambda u: jnp.where(live, u, jnp.zeros_like(u)), new_updates)
        if state_too:
            new_state = jax.tree.map(lambda new, old: jnp.where(live, new, old), new_state, state)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scale_by_learning_rate(lr: Schedule, factors: Callable | None = None) -> optax.GradientTransformationExtraArgs:
    """Multiplies by -lr(step), after any momentum, so the learning rate is never averaged.

    `factors(params)`: each parameter's own factor; None: 1.
    """

    def update(updates, state, params=None, *, step, **_):
        value = lr(step)
        updates = jax.tree.map(lambda u: -value.astype(u.dtype) * u, updates)
        return updates if factors is None else jax.tree.map(lambda u, f: u * f, updates, factors(params)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: ConfigDict, schedules: Schedules, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of `config.optim`; call `update(grads, state, params, step=global_step)`.

    adamw: decoupled decay, as `torch.optim.AdamW`. sgd: decay joins the gradient, then momentum. lars: decay, trust
    ratio, then momentum. The last layer is frozen for `freeze_last_layer` epochs (`utils.cancel_gradients_last_layer`,
    or with `freeze_by=lr` as in DINOv2's `apply_optim_scheduler`).
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
    frozen = hold(core, optim.freeze_last_layer * steps_per_epoch, state_too=optim.freeze_by == "gradient")
    factors = functools.partial(lr_factors, layer_decay=optim.layer_decay, patch_embed_lr=optim.patch_embed_lr)
    alike = optim.layer_decay == optim.patch_embed_lr == 1
    return optax.chain(
        clip_gradient(optim.clip_grad, optim.clip_by),
        optax.partition({"rest": core, "last_layer": frozen}, layer_labels),
        scale_by_learning_rate(schedules.lr, None if alike else factors),
    )
