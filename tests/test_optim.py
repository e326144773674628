"""Tests of training/optim.py; tests/figures/lars.py wrote the reference values with PyTorch."""

import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simsiam_jax import errors
from simsiam_jax.training import optim

FIGURES = pathlib.Path(__file__).parent / 'figures' / 'lars.npz'


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_lars_matches_official_evaluation_code(weight_decay: float) -> None:
    with np.load(FIGURES) as file:
        figures = {k.partition('/')[2]: file[k] for k in file if k.startswith(f'{weight_decay}/')}
    tx = optim.lars(lambda step: 50.0 * (1 - step / 20), 0.9, weight_decay)
    params = [jnp.asarray(figures[f'start{i}']) for i in range(3)]
    state = tx.init(params)
    for step in range(20):
        grads = [jnp.asarray(figures[f'grad{i}'][step]) for i in range(3)]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for i, param in enumerate(params):
        np.testing.assert_allclose(param, figures[f'end{i}'], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'lars'])
def test_make_excludes_biases_from_decay_and_lars(name: str) -> None:
    params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
    grads = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
    tx, _ = optim.make(
        batch_size=256,
        epochs=1,
        steps_per_epoch=1,
        name=name,
        learning_rate=1.0,
        weight_decay=0.5,
        exclude_bn_bias=True,
        predictor_schedule='decayed',
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates['bias'], -1.0)  # the plain gradient
    # Decayed by SGD; scaled to trust |w| / (|g| + wd |w|) x 1.5 = 0.001 by LARS.
    np.testing.assert_allclose(updates['kernel'], {'sgd': -1.5, 'lars': -1e-3}[name], rtol=1e-6)


def test_make_rejects_unknown_optimizer() -> None:
    with pytest.raises(errors.UserError, match=r"optim\.name is 'adam'.*mean adamw"):
        optim.make(batch_size=256, epochs=1, steps_per_epoch=1, name='adam')
