from __future__ import annotations

import jax
import numpy as np
import pytest

from dino_jax.eval.logistic import fit_logistic


def problem(seed=0, n=600, width=24, classes=7):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    means = rng.normal(size=(classes, width))
    features = means[labels] + rng.normal(size=(n, width)) * np.geomspace(0.2, 3, width) + 0.5
    return features, labels, classes


def objective(weights, features, labels, penalty):
    logits = features @ weights
    top = logits.max(1)
    losses = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(labels)), labels]
    return losses.mean() + penalty / 2 * np.sum(np.square(weights))


@pytest.mark.extra
def test_reaches_the_optimum_of_sklearn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels, classes = problem()
    penalty = 0.1 / len(labels)
    fit = fit_logistic(features, labels, classes, penalty)
    peer = linear_model.LogisticRegression(
        C=1 / (penalty * len(labels)), fit_intercept=False, max_iter=10_000, tol=1e-8
    ).fit(features, labels)
    optimum = objective(peer.coef_.T, features, labels, penalty)
    assert objective(fit.weights.astype(np.float64), features, labels, penalty) == pytest.approx(optimum, abs=1e-4)
    assert fit.loss == pytest.approx(optimum, abs=1e-4)


def test_the_gradient_vanishes_and_the_bound_holds():
    features, labels, classes = problem(1)
    loose, tight = (fit_logistic(features, labels, classes, 0.01, tolerance=t) for t in (1e-1, 1e-6))
    assert loose.gap <= 1e-1 and tight.gap <= 1e-6 and loose.iterations < tight.iterations
    assert -1e-6 <= loose.loss - tight.loss <= loose.gap
    logits = features @ tight.weights
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    grad = features.T @ (softmax - np.eye(classes)[labels]) / len(labels) + 0.01 * tight.weights
    assert np.abs(grad).max() < 1e-3


def test_one_device_equals_eight_whatever_the_remainder():
    features, labels, classes = problem(2, n=203)
    one, eight = (fit_logistic(features, labels, classes, 0.01, devices=d) for d in (jax.devices()[:1], None))
    np.testing.assert_allclose(one.loss, eight.loss, atol=1e-4)


def test_no_more_iterations_than_asked():
    features, labels, classes = problem(3)
    assert fit_logistic(features, labels, classes, 1e-6, max_iterations=3).iterations == 3
