from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.eval import propagation


def naive(sources, target, labels, radius, topk, temperature):
    """Reference by the formula, with the full masked affinity."""
    h, w, _ = target.shape
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    affinity = np.exp(np.einsum("abd,nijd->abnij", unit(target), unit(sources)) / temperature)
    far_rows, far_columns = (np.abs(np.subtract.outer(np.arange(s), np.arange(s))) > radius for s in (h, w))
    far = far_rows[:, None, None, :, None] | far_columns[None, :, None, None, :]
    affinity = np.where(far, 0, affinity).reshape(h, w, -1)
    affinity = np.where(affinity < np.sort(affinity, -1)[..., -topk, None], 0, affinity)
    return affinity / affinity.sum(-1, keepdims=True) @ labels.reshape(-1, labels.shape[-1])


def problem(seed, n=3, h=11, w=19, width=6, labels=3):
    rng = np.random.default_rng(seed)
    one_hot = np.eye(labels)[rng.integers(labels, size=(n, h, w))]
    arrays = rng.normal(size=(n, h, w, width)), rng.normal(size=(h, w, width)), one_hot
    return tuple(a.astype(np.float32) for a in arrays)


@pytest.mark.parametrize(("radius", "topk"), [(2, 5), (4, 1), (30, 7), (0, 4)])
def test_equals_the_whole_affinity(radius, topk):
    sources, target, labels = problem(radius)
    got = propagation.propagate(sources, target, labels, radius=radius, topk=topk)
    np.testing.assert_allclose(got, naive(sources, target, labels, radius or 99, topk, 0.1), atol=1e-5)


def test_absent_context_frames_do_not_count_and_one_device_equals_eight():
    sources, target, labels = problem(5)
    valid = np.array([True, False, True])
    got = propagation.propagate(sources, target, labels, valid, radius=3)
    np.testing.assert_allclose(got, naive(sources[valid], target, labels[valid], 3, 5, 0.1), atol=1e-5)
    one = propagation.propagate(sources, target, labels, valid, radius=3, devices=jax.devices()[:1])
    np.testing.assert_allclose(got, one, atol=1e-6)


def test_a_shifted_image_carries_its_labels_along():
    rng = np.random.default_rng(7)
    scene, labels = rng.normal(size=(1, 12, 20, 16)), np.eye(4)[rng.integers(4, size=(1, 12, 20))]
    moved = np.roll(scene[0], (2, 3), (0, 1))
    got = propagation.propagate(scene, moved, labels, radius=3, topk=1)
    np.testing.assert_allclose(got[2:, 3:], labels[0, :-2, :-3], atol=1e-6)


def test_a_label_that_is_nowhere_never_wins():
    soft = np.zeros((2, 3, 3), np.float32)
    soft[..., 0], soft[0, 0, 2] = 1, 0.4
    labels = np.asarray(propagation.hard_labels(jnp.asarray(soft), 4))
    assert set(np.unique(labels)) == {0, 2} and labels[0, 0] == 2 and labels[-1, -1] == 0


def test_memory_is_a_quarter_of_the_naive_way():
    n, h, w, width = 8, 30, 52, 16  # a 480p frame at patch 16; larger frames save more

    def whole(sources, target, labels, far):
        affinity = jnp.exp(jnp.einsum("qd,nsd->nsq", target, sources) / 0.1) * ~far
        affinity = affinity.reshape(-1, h * w)
        least = jax.lax.top_k(affinity.T, 5)[0].min(-1)
        affinity = jnp.where(affinity < least, 0, affinity)
        return labels.reshape(-1, 4).T @ (affinity / affinity.sum(0))

    shapes = [(n, h * w, width), (h * w, width), (n, h * w, 4)]
    far = jax.ShapeDtypeStruct((h * w, h * w), bool)
    naive_memory = jax.jit(whole).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], far).compile()
    step = propagation._compiled(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), h, w, 12, 5, 0.1)
    shapes = [(n, h, w, width), (h, w, width), (n, h, w, 4)]
    valid = jax.ShapeDtypeStruct((n,), bool)
    memory = step.lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], valid).compile()
    peak = lambda c: c.memory_analysis().temp_size_in_bytes  # noqa: E731
    assert 4 * peak(memory) <= peak(naive_memory)
