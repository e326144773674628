"""Tests of training/logistic.py against scikit-learn, and of the precision of all classifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from simsiam_jax.tasks import probe
from simsiam_jax.tasks.features import Features
from simsiam_jax.training import classifier, logistic

STRENGTHS = (0.01, 1.0, 100.0)


@pytest.mark.parametrize('classes', [2, 10])
def test_path_reaches_scikit_learns_accuracy(classes: int) -> None:
    x, labels = load_digits(n_class=classes, return_X_y=True)
    plain = np.float32(x / 16)
    x = plain + 3  # a large mean, as raw pixels have, which only changes the bias
    fitted = np.arange(len(x)) % 4 > 0
    held_out = Features(x[~fitted], labels[~fitted], np.flatnonzero(~fitted))
    heads = logistic.path(x, labels, fitted, STRENGTHS, classes=classes)
    for strength, head in zip(STRENGTHS, heads, strict=True):
        reference = LogisticRegression(C=strength, max_iter=10_000)
        reference.fit(plain[fitted], labels[fitted])  # hundreds of steps fewer than with the mean
        accuracy = reference.score(plain[~fitted], held_out.labels)
        error = np.sqrt(accuracy * (1 - accuracy) / len(held_out.x))
        scores = probe.score(head, held_out)
        assert scores.top1[0] == pytest.approx(accuracy, abs=error + 1e-6)
        if strength <= 1:  # weaker regularization leaves the end to the stopping rule
            p = reference.predict_proba(plain[~fitted])[np.arange(len(held_out.x)), held_out.labels]
            assert scores.loss[0] == pytest.approx(-np.log(p).mean(), rel=0.01)


@pytest.mark.parametrize('block', [100, 599, 1797, 5000])
def test_fit_in_blocks_equals_fit_of_all(block: int, monkeypatch) -> None:
    x, labels = load_digits(return_X_y=True)
    x, counted = np.float32(x / 16), np.arange(len(x)) % 3 > 0
    (whole,) = logistic.path(x, labels, counted, (0.01,), classes=10)
    monkeypatch.setattr(logistic, '_BLOCK', block)
    logistic._fit.clear_cache()
    (blocks,) = logistic.path(x, labels, counted, (0.01,), classes=10)
    logistic._fit.clear_cache()
    np.testing.assert_allclose(blocks['kernel'], whole['kernel'], atol=2e-3)
    assert np.abs(whole['kernel']).max() > 0.05


def test_gradient_of_blocks_equals_that_of_the_plain_loss(monkeypatch) -> None:
    monkeypatch.setattr(logistic, '_BLOCK', 7)
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((17, 3), np.float32), np.arange(17) % 4
    weights, mean = rng.random(17, np.float32), np.float32([1, 2, 3])
    x, labels, weights, mean = map(jnp.asarray, (x, labels, weights, mean))
    head = {'kernel': jnp.ones((3, 4)), 'bias': jnp.arange(4.0)}

    def plain(head):
        return logistic._weighted_loss(head, x - mean, labels, weights)

    def in_blocks(head):
        return 3 * logistic._cross_entropy(head, x, labels, weights, mean) / 3

    expected, found = jax.value_and_grad(plain)(head), jax.value_and_grad(in_blocks)(head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, found)


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


def test_products_of_classifiers_are_float32_on_every_device(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((8, 3), np.float32), np.arange(8) % 2
    heads, programs = classifier.init_heads(1, 3, 2, 0), []

    def loss(heads: dict) -> jax.Array:
        losses, _ = classifier.head_cross_entropy(heads, jnp.asarray(x), jnp.asarray(labels))
        return losses.sum()

    programs.append(jax.make_jaxpr(jax.value_and_grad(loss))(heads))
    real = logistic._fit

    def recorded(*given) -> dict:
        programs.append(jax.make_jaxpr(real)(*given))
        return real(*given)

    monkeypatch.setattr(logistic, '_fit', recorded)
    next(logistic.path(x, labels, np.ones(8, bool), (1.0,), classes=2))
    for program in programs:
        products = str(program).split('dot_general[')[1:]
        assert products
        for product in products:
            assert 'Precision.HIGHEST' in product.partition('preferred_element_type')[0]
