"""The training step, a pure function of (state, inputs), and the training state.

Legend: B batch, C crops (2 global ones first), K prototypes, A microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from dino_jax.data.masking import Masking, make_masking
from dino_jax.errors import UserError
from dino_jax.models import build_network
from dino_jax.models.network import Chosen, Outputs, Views, choose
from dino_jax.objectives.objective import Objective, make_objectives, total_loss
from dino_jax.parallel import sharding
from dino_jax.training import optim
from dino_jax.training.schedules import Schedules, make_schedules
from dino_jax.training.teacher import EmaState, ParameterTransform, ema_teacher

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}
Inputs = Views | list[jax.Array]  # the list: crops alone, [globals [B, 2, H, W, c], locals [B, n, h, w, c]]
Metrics = dict[str, jax.Array]

REST = ("step", "objectives", "opt_state", "salt", "bad_steps")  # fields besides student and teacher


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes; this and the configuration determine the rest of a run."""

    step: jax.Array  # int32, the next global step
    student: Variables
    ema: EmaState  # the teacher's parameters
    teacher_stats: Any  # the teacher's own batch statistics
    objectives: dict[str, Any]  # the state of each objective term, by its name
    opt_state: optax.OptState
    salt: jax.Array  # int32, raised by a rewind to draw other crops and drop-path factors
    bad_steps: jax.Array  # int32, non-finite steps in a row so far

    def __repr__(self) -> str:
        """One line, for a notebook that shows what `train` returns."""
        count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self.student["params"]))  # or shardings
        return f"TrainState(step={self.step}, parameters={count:,})"

    @property
    def teacher(self) -> Variables:
        """The teacher's variables, as `network.apply` takes them."""
        return {"params": self.ema.teacher, "batch_stats": self.teacher_stats}


def to_items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint: `student`, `teacher` (all that an evaluation needs) and `rest`."""
    rest = {name: getattr(state, name) for name in REST}
    return {"student": state.student, "teacher": state.teacher, "rest": rest}


def from_items(items: dict[str, Any]) -> TrainState:
    """Inverts `to_items`."""
    teacher = items["teacher"]
    return TrainState(
        student=items["student"],
        ema=EmaState(teacher["params"]),
        teacher_stats=teacher["batch_stats"],
        **items["rest"],
    )


class Recipe(NamedTuple):
    """The parts of the step, built once from a configuration."""

    network: Any  # models.network.Network
    optimizer: optax.GradientTransformationExtraArgs
    ema: ParameterTransform
    schedules: Schedules
    objectives: tuple[Objective, ...]
    config: ConfigDict
    masking: Masking | None

    @property
    def patches(self) -> str:
        """Which patches' logits the terms read: "masked", "all" or "": none."""
        asked = {term.patches for term in self.objectives}
        return max(asked, key=["", "masked", "all"].index)

    def chosen(self, masked: jax.Array) -> Chosen:
        """The patches that the terms read, for masks [B, 2, N] of one device and microbatch."""
        assert self.masking is not None
        return choose(masked, None if self.patches == "all" else self.masking.capacity(masked.shape[0]))


def make_recipe(config: ConfigDict, steps_per_epoch: int) -> Recipe:
    """Builds network, optimizer, teacher, schedules and objective terms from a configuration.

    Raises:
      UserError: unknown model or optimizer; a patch that does not divide a crop; no objective.
    """
    schedules = make_schedules(config, steps_per_epoch)
    return Recipe(
        network=build_network(config),
        optimizer=optim.make_optimizer(config, schedules, steps_per_epoch),
        ema=ema_teacher(schedules.momentum),
        schedules=schedules,
        objectives=make_objectives(config, schedules),
        config=config,
        masking=make_masking(config),
    )


def check_batch(recipe: Recipe, mesh: Mesh) -> None:
    """Raises `UserError` unless the batch divides over devices and microbatches and gives each enough images."""
    size, parts = recipe.config.batch_size, recipe.config.run.accum_steps
    sharding.check_batch(size, mesh, parts)
    parts *= math.prod(mesh.shape[axis] for axis in sharding.AXES.batch)
    for term in recipe.objectives:
        if size // parts < term.min_rows:
            raise UserError(
                f"batch_size={size}: objective.{term.name} compares at least {term.min_rows} images per device and "
                f"microbatch, but {parts} device(s) x run.accum_steps leave {size // parts}: use at least "
                f"{term.min_rows * parts}, or set objective.{term.name}.weight=0"
            )
    if recipe.masking is not None:
        recipe.masking.capacity(size // parts)


def init_state(recipe: Recipe, key: jax.Array) -> TrainState:
    """A fresh state; the teacher starts as a copy of the student (official `main_dino.py`)."""
    config = recipe.config
    chans = config.model.in_chans
    crops = [jnp.zeros((1, 2, *config.crops.global_size, chans)), jnp.zeros((1, 1, *config.crops.local_size, chans))]
    chosen = masked = None
    if recipe.masking is not None:
        masked = jnp.zeros((1, 2, recipe.masking.patches), bool)
        chosen = choose(masked, 1)
    crops = crops[: 2 if config.crops.local_count else 1]
    variables = recipe.network.init(key, crops, masked=masked, chosen=chosen)
    return state_from_student(recipe, variables)


def state_from_student(recipe: Recipe, variables: Variables) -> TrainState:
    """The state at step 0 with these variables for student and teacher."""
    student = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        ema=recipe.ema.init(student["params"]),
        teacher_stats=jax.tree.map(lambda x: jnp.array(x, copy=True), student["batch_stats"]),
        objectives={term.name: term.init() for term in recipe.objectives},
        opt_state=recipe.optimizer.init(student["params"]),
        salt=jnp.zeros((), jnp.int32),
        bad_steps=jnp.zeros((), jnp.int32),
    )


def draw_drop_path(recipe: Recipe, key: jax.Array, batch: int) -> jax.Array | None:
    """Draws drop-path factors [depth, branches, B, C], 0 or 1 / keep, per crop and residual branch; None at rate 0."""
    rates = recipe.network.backbone.drop_rates(recipe.config.model.drop_path)  # [depth, branches]
    if not rates.any():
        return None
    keep = 1.0 - jnp.asarray(rates)[..., None, None]
    crops = 2 + recipe.config.crops.local_count
    return jax.random.bernoulli(key, keep, (*rates.shape, batch, crops)) / keep


class Measured(NamedTuple):
    """Values of the objective terms, averaged over rows, by the term's name."""

    losses: dict[str, jax.Array]
    terms: dict[str, Any]
    statistics: dict[str, Any]  # of the targets


def _forward(
    network: Any, variables: Variables, views: Views, chosen: Chosen | None, keep: jax.Array | None = None
) -> tuple[Outputs, Any]:
    """Training-mode outputs and the new batch statistics."""
    outputs, new = network.apply(
        variables,
        views.crops,
        drop_path=keep,
        train=True,
        masked=views.masked,
        chosen=chosen,
        mutable=["batch_stats"],
    )
    outputs = outputs._replace(logits=sharding.constrain(outputs.logits, "batch", None, "prototypes"))
    if outputs.patch_logits is not None:
        outputs = outputs._replace(patch_logits=sharding.constrain(outputs.patch_logits, None, "prototypes"))
    return outputs, new.get("batch_stats", {})


def _gradients(recipe: Recipe, state: TrainState, views: Views, keep: jax.Array | None) -> tuple[Any, Any]:
    """`_accumulate`, sharded over the mesh of the enclosing context if that spreads the rows over several devices.

    Each device uses the whole parameters on its own rows and sums its gradients in the parameters' type; then there is
    one reduction. XLA's partitioner on TPU instead reduced the backbone's gradient for every resolution and
    microbatch, in the compute type. It still handles the `model` axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[axis] for axis in sharding.AXES.batch) == 1:
        return _accumulate(recipe, state, views, keep)
    state = state.replace(opt_state=())
    places = sharding.row_specs(sharding.state_shardings(state, mesh, logical_axes(recipe)))
    grad_places = places.student["params"]

    def local(state, views, keep):
        stats, (grads, measured) = _accumulate(recipe, sharding.gather(state, places), views, keep)
        stats, measured = sharding.mean_over_rows((stats, measured))
        return stats, (sharding.scatter_mean(grads, grad_places), measured)

    return jax.shard_map(
        local,
        in_specs=(places, sharding.AXES.spec("batch"), sharding.AXES.spec(None, None, "batch")),
        out_specs=(PartitionSpec(), (grad_places, PartitionSpec())),
        axis_names=set(sharding.AXES.batch),
        check_vma=False,
    )(state, views, keep)


def _microbatch(
    recipe: Recipe, state: TrainState, stats: tuple[Any, Any], views: Views, keep: jax.Array | None
) -> tuple[Any, Any]:
    """Gradients and `Measured` of one microbatch; `stats` are (student's, teacher's) batch statistics before it."""
    student_stats, teacher_stats = stats
    network, objectives = recipe.network, recipe.objectives
    chosen = recipe.chosen(views.masked) if recipe.patches else None
    teacher, teacher_stats = _forward(
        network, {"params": state.ema.teacher, "batch_stats": teacher_stats}, Views(views.crops[:1]), chosen
    )
    aims = {term.name: term.targets(state.objectives[term.name], teacher, state.step) for term in objectives}

    def loss_fn(params):
        student, new_stats = _forward(network, {"params": params, "batch_stats": student_stats}, views, chosen, keep)
        found = {term.name: term.loss(student, aims[term.name][0], state.step) for term in objectives}
        losses = {name: loss for name, (loss, _) in found.items()}
        measured = Measured(
            losses,
            terms={name: terms for name, (_, terms) in found.items()},
            statistics={name: statistics for name, (_, statistics) in aims.items()},
        )
        return total_loss(objectives, losses), (measured, new_stats)

    grads, (measured, student_stats) = jax.grad(loss_fn, has_aux=True)(state.student["params"])
    return (student_stats, teacher_stats), (grads, measured)


def _accumulate(recipe: Recipe, state: TrainState, views: Views, keep: jax.Array | None) -> tuple[Any, Any]:
    """`_microbatch` averaged over `run.accum_steps` microbatches.

    Rows are reshaped [B] -> [B / A, A] and axis 1 is scanned, so every device keeps its own rows and a microbatch holds
    the same rows on any number of devices.
    """
    stats = (state.student["batch_stats"], state.teacher_stats)
    a = recipe.config.run.accum_steps
    if a == 1:
        return _microbatch(recipe, state, stats, views, keep)

    def deal(x, axis):
        x = x.reshape(*x.shape[:axis], -1, a, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)  # [A, ..., B / A, ...]

    micro = (jax.tree.map(lambda x: deal(x, 0), views), jax.tree.map(lambda m: deal(m, 2), keep))

    def body(carry, inputs):
        stats, total = carry
        stats, out = _microbatch(recipe, state, stats, *inputs)
        return (stats, jax.tree.map(lambda t, x: t + x / a, total, out)), None

    first = jax.tree.map(lambda x: x[0], micro)
    _, shapes = jax.eval_shape(lambda x: _microbatch(recipe, state, stats, *x), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (stats, total), _ = jax.lax.scan(body, (stats, zeros), micro)
    return stats, total


def train_step(recipe: Recipe, state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
    """Updates student, teacher and the objectives' states, in the order of the official `train_one_epoch`.

    With a non-finite loss or gradient, only `step` and `bad_steps` change.

    Args:
      recipe: from `make_recipe`.
      state: the state before the step.
      inputs: crops, normalized, in the compute type; with an objective on patches `Views`, with their masks.

    Returns:
      The next state and scalar float32 metrics.
    """
    config, objectives = recipe.config, recipe.objectives
    step, params = state.step, state.student["params"]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.salt), step)
    views = inputs if isinstance(inputs, Views) else Views(inputs)
    keep = draw_drop_path(recipe, key, views.crops[0].shape[0])

    (student_stats, teacher_stats), (grads, measured) = _gradients(recipe, state, views, keep)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, params, step=step)
    student = optax.apply_updates(params, updates)
    _, ema = recipe.ema.update(student, state.ema, step=step)  # after the student's update
    states = {  # the losses used the old ones
        term.name: term.update(state.objectives[term.name], measured.statistics[term.name]) for term in objectives
    }

    loss, grad_norm = total_loss(objectives, measured.losses), optax.global_norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    moved = state.replace(
        student={"params": student, "batch_stats": student_stats},
        ema=ema,
        teacher_stats=teacher_stats,
        objectives=states,
        opt_state=opt_state,
    )
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)
    state = state.replace(step=step + 1, bad_steps=jnp.where(good, 0, state.bad_steps + 1))
    metrics = {
        "loss": loss,
        **_objective_metrics(objectives, states, measured),
        "grad_norm": grad_norm,
        **{name: schedule(step) for name, schedule in recipe.schedules._asdict().items() if name != "patch_temp"},
        **({} if recipe.masking is None else {"patch_temp": recipe.schedules.patch_temp(step)}),
        "bad_steps": state.bad_steps,
    }
    return state, jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), metrics)


def _objective_metrics(objectives: Sequence[Objective], states: dict[str, Any], measured: Measured) -> Metrics:
    """Each term's metrics and, with several terms, `loss_<name>`: its loss without the weight."""
    metrics = {}
    for term in objectives:
        loss = measured.losses[term.name]
        if len(objectives) > 1:
            metrics[f"loss_{term.name}"] = loss
        metrics |= term.metrics(states[term.name], loss, measured.terms[term.name])
    return metrics


def logical_axes(recipe: Recipe) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Rules for `sharding.state_shardings`, for arrays of the state that are not sharded by size alone."""
    rules = [
        (rf"(^|/)objectives/{term.name}/{name}$", axes)
        for term in recipe.objectives
        for name, axes in term.logical_axes.items()
    ]
    return ((r"last_layer/(v|g)$", ("prototypes",)), *rules)


def abstract_inputs(recipe: Recipe) -> Views:
    """Shape and dtype of a global batch's inputs."""
    config = recipe.config
    rows, dtype = config.batch_size, jnp.dtype(config.model.dtype)
    groups = ((2, config.crops.global_size), (config.crops.local_count, config.crops.local_size))
    shapes = [(rows, count, *size, config.model.in_chans) for count, size in groups if count]
    masked = None if recipe.masking is None else jax.ShapeDtypeStruct((rows, 2, recipe.masking.patches), bool)
    return Views([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], masked)


def abstract_state(recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state."""
    shapes = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    places = sharding.state_shardings(shapes, mesh, logical_axes(recipe))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(recipe, mesh))


def jit_train_step(recipe: Recipe, mesh: Mesh) -> Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]:
    """`train_step` jitted over a mesh: inputs sharded by rows, state donated.

    The only collectives are for gradients, objectives, metrics and batch statistics, with `fsdp` for parameters, and
    with `model` for the softmax.
    """
    state_shardings, rows, everywhere = (
        shardings(recipe, mesh),
        sharding.batch_sharding(mesh),
        sharding.replicated(mesh),
    )

    def step(state, inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(recipe, state, inputs)

    return jax.jit(
        step, in_shardings=(state_shardings, rows), out_shardings=(state_shardings, everywhere), donate_argnums=0
    )


def jit_init_state(recipe: Recipe, mesh: Mesh) -> TrainState:
    """`init_state` with `config.seed`, each array created on its own devices, with the same values on any mesh."""
    init = jax.jit(lambda key: init_state(recipe, key), out_shardings=shardings(recipe, mesh))
    return init(jax.random.key(recipe.config.seed))
