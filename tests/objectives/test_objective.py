"""Which terms a configuration asks for, and how the step adds them up."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.objectives.objective import make_objectives
from dino_jax.training import step as train_step
from tests.tiny import random_crops, tiny_config


def test_weights_choose_the_terms():
    config = default()
    assert [term.name for term in make_objectives(config)] == ["dino"]
    config.objective.koleo.weight = 0.1
    assert [(term.name, term.weight) for term in make_objectives(config)] == [("dino", 1.0), ("koleo", 0.1)]
    config.objective.dino.weight = 0.0
    assert [term.name for term in make_objectives(config)] == ["koleo"]
    config.objective.koleo.weight = 0.0
    with pytest.raises(UserError, match=r"every weight is 0.*set objective\.dino\.weight=1"):
        make_objectives(config)


def test_a_weight_scales_the_loss_and_its_gradient_but_not_the_metrics():
    """One step with either weight: the total and the gradient's norm double, the rest stays."""

    def metrics(weight):
        config = tiny_config()
        config.objective.dino.weight = weight
        recipe = train_step.make_recipe(config, 4)
        state = train_step.init_state(recipe, jax.random.key(0))
        return jax.jit(lambda s, c: train_step.train_step(recipe, s, c)[1])(state, random_crops(config))

    one, two = metrics(1.0), metrics(2.0)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], 2 * one[name], rtol=1e-4)
    for name in ("teacher_entropy", "kl", "ln_k_gap", "center_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)
