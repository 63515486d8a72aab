from __future__ import annotations

import jax
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.eval.protocols import knn


def brute_force(train, train_labels, test, test_labels, k, temperature):
    """Reference by definition, one query at a time, with stably sorted votes."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    hits = np.zeros(2)
    for query, label in zip(unit(test), test_labels, strict=True):
        similarity = unit(train) @ query
        near = np.argsort(-similarity, kind="stable")[:k]
        votes = np.zeros(max(train_labels.max(), test_labels.max()) + 1)
        for i in near:
            votes[train_labels[i]] += np.exp(similarity[i] / temperature)
        ranking = np.argsort(-votes, kind="stable")[: min(5, k)]
        hits += [label == ranking[0], label in ranking]
    return tuple(100 * hits / len(test))


def random_problem(rng, train=331, test=57, width=12, classes=9):
    means = rng.normal(size=(classes, width))
    train_labels, test_labels = rng.integers(classes, size=train), rng.integers(classes, size=test)
    draw = lambda labels: means[labels] + rng.normal(size=(len(labels), width))  # noqa: E731
    return draw(train_labels), train_labels, draw(test_labels), test_labels


@pytest.mark.parametrize("chunk", [128, 10_000])
def test_equals_the_definition_for_any_chunk_and_remainder(chunk):
    problem = random_problem(np.random.default_rng(0))
    got = knn.knn_classify(*problem, ks=(1, 3, 20, 50), chunk=chunk)
    for k in (1, 3, 20, 50):
        np.testing.assert_allclose(got[k], brute_force(*problem, k, 0.07), atol=1e-9)


def test_one_device_equals_eight():
    problem = random_problem(np.random.default_rng(1))
    one = knn.nearest(problem[2], problem[0], 30, chunk=128, devices=jax.devices()[:1])
    eight = knn.nearest(problem[2], problem[0], 30, chunk=128)
    np.testing.assert_array_equal(one[1], eight[1])
    np.testing.assert_allclose(one[0], eight[0], atol=1e-6)


@pytest.mark.extra
def test_nearest_equals_sklearn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(2)
    train, train_labels, test, _ = random_problem(rng)
    model = neighbors.KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train, train_labels)
    predicted = model.predict(test)
    assert knn.knn_classify(train, train_labels, test, predicted, ks=(20,))[20][0] == 100


def test_a_query_among_its_duplicates_and_a_class_nobody_votes_for():
    train = np.eye(4)[[0, 0, 1, 2]]
    got = knn.knn_classify(train, np.array([3, 3, 1, 2]), np.eye(4)[[0, 1]], np.array([3, 0]), ks=(1, 2))
    assert got[1] == (50.0, 50.0)


def test_selection_by_blocks_is_exact():
    values = np.random.default_rng(3).normal(size=(5, 4096)).astype(np.float32)
    select = jax.jit(knn.candidates, static_argnums=1)
    for valid in (4096, 4000, 3997, 44):
        value, column = map(np.asarray, select(values, 40, valid))
        assert value.shape == (5, 320)
        np.testing.assert_array_equal(np.sort(value, axis=1)[:, -40:], np.sort(values[:, :valid], axis=1)[:, -40:])
        np.testing.assert_array_equal(np.take_along_axis(values, column, 1)[column < valid], value[column < valid])


def test_bad_input_is_named():
    train, train_labels, test, test_labels = random_problem(np.random.default_rng(4))
    with pytest.raises(UserError, match="lower k"):
        knn.knn_classify(train, train_labels, test, test_labels, ks=(1000,))
    with pytest.raises(UserError, match="no labels"):
        knn.knn_classify(train, np.full(len(train), -1), test, test_labels, ks=(5,))
    with pytest.raises(UserError, match="as many of each"):
        knn.knn_classify(train, train_labels[:-1], test, test_labels, ks=(5,))
