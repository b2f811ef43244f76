from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from moderation.features import FeatureOptions, hash_features
from moderation.logistic import build_matrix, fit_logistic, fit_platt
from quant.progress import SilentProgress

pytestmark = pytest.mark.unit


def test_weights_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 16)) * (rng.random((200, 16)) < 0.4)
    labels = (rows @ rng.normal(size=16) + 0.3 + rng.normal(size=200) > 0).astype(np.float64)
    row_weights = rng.uniform(0.5, 2.0, 200)
    l2 = 0.01

    weights, bias = fit_logistic(
        csr_matrix(rows), labels, row_weights, bucket_bits=4, l2=l2, iterations=500, progress=SilentProgress()
    )

    expected = LogisticRegression(C=1.0 / (l2 * row_weights.sum()), tol=1e-10, max_iter=5000)
    expected.fit(rows, labels, sample_weight=row_weights)
    np.testing.assert_allclose(weights, np.ravel(expected.coef_), atol=2e-4)
    assert bias == pytest.approx(float(np.ravel(expected.intercept_)[0]), abs=2e-4)


def test_matrix_rows_are_the_features_of_the_texts() -> None:
    options = FeatureOptions(bucket_bits=8)
    texts = ["one two three", "", "杀毒软件"]

    matrix = build_matrix(texts, options, SilentProgress())

    for i, text in enumerate(texts):
        features = hash_features(text, options)
        expected = np.zeros(256)
        np.add.at(expected, features.indices, features.values)
        np.testing.assert_allclose(matrix[[i]].toarray()[0], expected, atol=1e-7)


def test_platts_line_undoes_a_known_distortion() -> None:
    rng = np.random.default_rng(0)
    true_logits = rng.normal(size=20_000) * 3.0
    labels = (rng.random(20_000) < 1.0 / (1.0 + np.exp(-true_logits))).astype(np.float64)

    slope, intercept = fit_platt(true_logits * 4.0 + 2.0, labels)

    assert slope == pytest.approx(0.25, rel=0.05)
    assert intercept == pytest.approx(-0.5, abs=0.05)


def test_platts_line_stays_finite_when_the_scores_separate_the_labels() -> None:
    slope, intercept = fit_platt(np.array([-5.0, -4.0, 4.0, 5.0]), np.array([0.0, 0.0, 1.0, 1.0]))

    assert 0.0 < slope < 10.0
    assert abs(intercept) < 10.0
