"""Tests of training/logistic.py against scikit-learn."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from simsiam_jax.tasks import probe
from simsiam_jax.tasks.features import Features
from simsiam_jax.training import logistic

STRENGTHS = (0.01, 1.0, 100.0)


@pytest.mark.parametrize('classes', [2, 10])
def test_path_reaches_scikit_learns_accuracy(classes: int) -> None:
    x, labels = load_digits(n_class=classes, return_X_y=True)
    x = np.float32(x / 16 + 3)  # a large mean, as raw pixels have
    fitted = np.arange(len(x)) % 4 > 0
    held_out = Features(x[~fitted], labels[~fitted], np.flatnonzero(~fitted))
    heads = logistic.path(x, labels, fitted, STRENGTHS, classes=classes)
    for strength, head in zip(STRENGTHS, heads, strict=True):
        reference = LogisticRegression(C=strength, max_iter=10_000)
        reference.fit(x[fitted], labels[fitted])
        accuracy = reference.score(held_out.x, held_out.labels)
        error = np.sqrt(accuracy * (1 - accuracy) / len(held_out.x))
        scores = probe.score(head, held_out)
        assert scores.top1[0] == pytest.approx(accuracy, abs=error + 1e-6)
        if strength <= 1:  # weaker regularization leaves the end to the stopping rule
            p = reference.predict_proba(held_out.x)[np.arange(len(held_out.x)), held_out.labels]
            assert scores.loss[0] == pytest.approx(-np.log(p).mean(), rel=0.01)


def test_features_that_do_not_count_change_nothing() -> None:
    x, labels = load_digits(return_X_y=True)
    x, counted = np.float32(x / 16), np.arange(len(x)) % 2 == 0
    (head,) = logistic.path(x, labels, counted, (1.0,), classes=10)
    everything = np.ones(counted.sum(), bool)
    (alone,) = logistic.path(x[counted], labels[counted], everything, (1.0,), classes=10)
    np.testing.assert_allclose(
        head['kernel'], alone['kernel'], atol=0.02
    )  # both end within the tolerance
    assert np.abs(alone['kernel']).max() > 0.5
