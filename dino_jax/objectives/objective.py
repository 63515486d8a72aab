"""The record of an objective term, and the terms that a configuration asks for.

A run minimizes a weighted sum of terms. Each is one module of this package: pure functions of the network's outputs,
and `make(config, schedules)`, which returns an `Objective`. A group `config.objective.<name>` with a `weight` makes
`dino_jax/objectives/<name>.py` a term; there is no other list. A weight of 0 removes the term from the program and the
state.

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
    """A problem that a term's metrics show."""

    name: str
    shown: Mapping[str, float]  # the metrics to print
    advice: str  # what to try
    early: bool = False  # reported during the warm-up too


class Place(NamedTuple):
    """Where an array is in the official code's full checkpoint."""

    path: str  # dotted
    shape: tuple[int, ...]  # its shape there, with the same number of values


def _no_targets(state: State, teacher: Outputs, step: jax.Array) -> tuple[Any, Statistics]:
    return None, {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term of the objective. Only `loss` is required; a term without state or targets needs nothing else.

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
    # array of the state -> its place in the official code's full checkpoint, if any
    official: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    # patches of the global crops whose logits the term reads: "masked", "all" or "": none
    patches: str = ""
    # minimum images per device and microbatch
    min_rows: int = 1
    # set by `make_objectives` from the configuration
    name: str = ""
    weight: float = 1.0


def make_objectives(config: ConfigDict, schedules: Any = None) -> tuple[Objective, ...]:
    """The terms of `config.objective` whose weight is not 0, in its order.

    Args:
      config: a whole run's configuration.
      schedules: its `training.schedules.Schedules`; None if no targets will be computed.

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
