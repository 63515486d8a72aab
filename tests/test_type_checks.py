"""Calls that do not fit the annotated shapes or types are refused in the tests."""

from __future__ import annotations

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dino_jax.eval import propagation, ranking
from dino_jax.models import Head, ViT, resize_pos_embed
from dino_jax.objectives.centering import centered, moved
from dino_jax.objectives.dino import dino_loss
from dino_jax.objectives.koleo import koleo
from dino_jax.render import ops
from tests import type_checks


def refused(function, *args) -> None:
    with pytest.raises(TypeCheckError, match="Type-check error"):
        function(*args)


def test_logits_center_and_views_have_to_fit():
    student, teacher, center = jnp.zeros((3, 4, 8)), jnp.zeros((3, 2, 8)), jnp.zeros(8)
    dino_loss(student, centered(teacher, center, 0.04))
    refused(centered, teacher, jnp.zeros(7), 0.04)  # another K
    refused(moved, center, jnp.zeros(7), 0.9)
    refused(dino_loss, student[..., :7], teacher)
    refused(dino_loss, student, teacher[:2])  # another B
    refused(dino_loss, student, student)  # four teacher views
    refused(dino_loss, student.astype(int), teacher)
    refused(jax.jit(dino_loss), student[..., :7], teacher)  # while it is traced
    refused(koleo, student)


def test_models_take_images_and_features():
    images = jnp.zeros((2, 16, 16, 3))
    refused(ViT(8, 1, 2, 8, (16, 16)).init, jax.random.key(0), images[0])
    refused(ViT(8, 1, 2, 8, (16, 16)).init, jax.random.key(0), images.astype(jnp.uint8))
    refused(Head(8, 4, 4).init, jax.random.key(0), images)
    refused(resize_pos_embed, jnp.zeros((5, 3)), (3, 3))


def test_functions_on_arrays_of_either_kind():
    labels, features = np.zeros((1, 2, 3, 4)), np.ones((1, 2, 3, 5))
    propagation.propagate(features, features[0], labels, radius=1)
    refused(propagation.propagate, features, features[0], labels[:, 1:])
    refused(ranking.similarity, np.ones((4, 3)), np.ones((4, 2)))
    refused(ops.resize_matrix, jnp.zeros(2, int), jnp.ones((), int), 4, 4)


def test_every_checked_module_exists():
    for name in type_checks.MODULES:
        module = importlib.import_module(name)
        for part in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{name}.{part.name}")
