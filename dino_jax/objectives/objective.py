"""Objective terms as records, and the terms that a configuration asks for.

A run minimizes a weighted sum of terms. Each is one module of this package: pure functions of the network's outputs,
and `make(config, schedules)`, which returns an `Objective`. The group `config.objective.<name>` with a `weight` is what
makes `dino_jax/objectives/<name>.py` a term; nothing else lists them. A weight of 0 leaves the term out of the program
and of the state.

Legend: B batch, C crops (2 global ones first), K prototypes, D width.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.models.network import Outputs

State = dict[str, Any]  # arrays by name
Statistics = Any  # a pytree of arrays
Terms = Any  # a pytree of arrays


class Finding(NamedTuple):
    """What a term's metrics say is wrong with a run."""

    name: str
    shown: Mapping[str, float]  # the evidence, as the user sees it
    advice: str  # what to try
    early: bool = False  # counts before the learning rate's warm-up is over, too


class Place(NamedTuple):
    """Where a full checkpoint of the official code has an array."""

    path: str  # dotted
    shape: tuple[int, ...]  # there; the same number of values


def _no_targets(state: State, teacher: Outputs, step: jax.Array) -> tuple[Any, Statistics]:
    return None, {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term of the objective. Only `loss` is required; a term without state or targets leaves the rest out.

    `targets` and `loss` see the rows of one microbatch on one device. Their statistics, losses and terms are averaged
    over microbatches and devices before `update` and `metrics` see them.
    """

    # (student outputs [B, C, ..], targets, step) -> scalar in at least float32, terms (batch means to report)
    loss: Callable[[Outputs, Any, jax.Array], tuple[jax.Array, Terms]]
    # () -> the state at step 0
    init: Callable[[], State] = dict
    # (state before the step, teacher outputs [B, 2, ..], step) -> targets without a gradient, statistics
    targets: Callable[[State, Outputs, jax.Array], tuple[Any, Statistics]] = _no_targets
    # (state, averaged statistics) -> the next state
    update: Callable[[State, Statistics], State] = lambda state, statistics: state
    # (next state, averaged loss, averaged terms) -> scalars to log, by name
    metrics: Callable[[State, jax.Array, Terms], dict[str, jax.Array]] = lambda state, loss, terms: {}
    # (logged metrics) -> what is wrong, or None
    diagnose: Callable[[Mapping[str, float]], Finding | None] = lambda metrics: None
    # (shapes of the student's outputs on a device) -> FLOPs of the matrix products, forward and backward
    flops: Callable[[Outputs], float] = lambda student: 0.0
    # array of the state -> logical names of its leading axes (see `parallel.sharding`); absent: replicated
    logical_axes: Mapping[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    # array of the state -> where the official code's full checkpoint has it; absent: not there
    official: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    # images that a device must see at once
    min_rows: int = 1
    # set by `make_objectives` from the configuration
    name: str = ""
    weight: float = 1.0


def make_objectives(config: ConfigDict, schedules: Any = None) -> tuple[Objective, ...]:
    """The terms of `config.objective` whose weight is not 0, in its order.

    Args:
      config: of a whole run.
      schedules: its `training.schedules.Schedules`; None where no target is computed (state, names and findings only).

    Raises:
      UserError: every weight is 0.
    """
    objectives = []
    for name, group in config.objective.items():
        if group.weight:
            make = importlib.import_module(f"dino_jax.objectives.{name}").make
            objectives.append(dataclasses.replace(make(config, schedules), name=name, weight=group.weight))
    if not objectives:
        raise UserError("objective: every weight is 0, so there is nothing to learn: set objective.dino.weight=1")
    return tuple(objectives)


def total_loss(objectives: tuple[Objective, ...], losses: Mapping[str, jax.Array]) -> jax.Array:
    """The weighted sum of the terms' losses."""
    first, *others = (term.weight * losses[term.name] for term in objectives)
    return sum(others, start=first)
