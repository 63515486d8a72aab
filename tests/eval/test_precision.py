"""Every matrix product in a score asks for full precision; TPUs default to bfloat16 and recent GPUs to TF32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh

from dino_jax.eval import logistic, propagation
from dino_jax.eval.protocols import dense, knn, linear

MESH = Mesh(np.array(jax.devices()[:1]), ("data",))


def ones(*shape):
    return jnp.ones(shape)


PROGRAMS = {
    "knn": lambda: (knn._search(MESH, 3), ones(128, 4), 0, 100, ones(8, 4), ones(8, 3), jnp.ones((8, 3), jnp.int32)),
    "propagation": lambda: (
        propagation._compiled(MESH, 9, 9, 2, 3, 0.1),
        *(ones(2, 9, 9, 4), ones(9, 9, 4), ones(2, 9, 9, 3), jnp.ones(2, bool)),
    ),
    "labels": lambda: (lambda soft: propagation.hard_labels(soft, 4), ones(5, 6, 3)),
    "logistic": lambda: (
        lambda *args: logistic._solve(*args, max_iterations=3),
        *(ones(4, 3), ones(8, 4), jnp.ones(8, jnp.int32), 0.1, 1e-3),
    ),
    "linear": lambda: (
        linear.logits_of,
        {"1": {"kernel": ones(2, 4, 3), "bias": ones(2, 3)}},
        {"1": ones(5, 4)},
    ),
    "dense": lambda: (
        lambda head, tokens: dense._pixels(head, tokens, 8),
        {"kernel": ones(4, 3), "bias": ones(3)},
        ones(2, 2, 2, 4),
    ),
}


def products(jaxpr: Jaxpr):
    """Every matrix product in a program, including inside loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from products(inner)


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_exact(name):
    function, *arguments = PROGRAMS[name]()
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert found
    for equation in found:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, equation
