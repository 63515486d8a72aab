from __future__ import annotations

import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.eval import ranking


def test_revisited_protocol_by_hand():
    # ranking: 0 junk, 1 easy, 2 other, 3 hard, 4 other
    similarity = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    truth = [{"easy": [1], "hard": [3], "junk": [0]}]
    scores = ranking.revisited_scores(similarity, truth, ks=(1, 2, 10))
    # medium: positives at ranks 0 and 2 of [1, 2, 3, 4]
    assert scores["medium"]["map"] == pytest.approx(((1 + 1) + (1 / 2 + 2 / 3)) / 4)
    assert scores["medium"]["mpk"] == pytest.approx({1: 1, 2: 1 / 2, 10: 2 / 3})
    # hard: the easy one is junk too, so the positive is at rank 1 of [2, 3, 4]
    assert scores["hard"]["map"] == pytest.approx((0 + 1 / 2) / 2)
    assert scores["hard"]["mpk"] == pytest.approx({1: 0, 2: 1 / 2, 10: 1 / 2})


def test_queries_without_positives_are_left_out_and_none_at_all_is_an_error():
    similarity = np.array([[0.9, 0.1], [0.1, 0.9]])
    truth = [{"easy": [0], "hard": [], "junk": []}, {"easy": [], "hard": [0], "junk": []}]
    scores = ranking.revisited_scores(similarity, truth)
    assert np.isnan(scores["hard"]["aps"][0]) and scores["hard"]["map"] == scores["hard"]["aps"][1]
    with pytest.raises(UserError, match="hard positive"):
        ranking.revisited_scores(similarity[:, :1], truth[:1])


def test_average_precision_bounds():
    assert ranking.average_precision(np.arange(5), 5) == 1
    assert ranking.average_precision(np.array([], int), 3) == 0
    assert ranking.average_precision(np.arange(2), 4) == 0.5


def test_whitened_features_have_unit_covariance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    features -= features.mean(0)
    white = ranking.Whitening(features)(features)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(6), atol=1e-10)
