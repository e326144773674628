"""Tests that SimSiam learns on real images, and collapses without stop-gradient as in the paper."""

import jax
import pytest
from configurations import load

from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step


def learn(*, stop_gradient: bool, epochs: int) -> dict[str, float]:
    config = load('quickstart', epochs=epochs, method__stop_gradient=stop_gradient)
    setup = pretrain_setup.build(config, mesh_lib.make_mesh(jax.devices()[:1]))
    state = mesh_lib.replicate(setup.init(), setup.mesh)

    def knn() -> float:
        (score,) = setup.knn(setup.encode, checkpoint.encoder_variables(state))
        return score.top1

    random = knn()
    train_step = step.make_train_step(setup.method, setup.tx, setup.mesh, setup.to_views)
    losses = []
    for batch in setup.batches(0, epochs * setup.sampler.steps_per_epoch):
        state, metrics = train_step(state, batch)
        losses.append(metrics['loss'])
    return {
        'random': random,
        'knn': knn(),
        'z_std': float(metrics['z_std']),
        'lowest': min(map(float, losses)),
    }


@pytest.fixture(scope='module')
def healthy() -> dict[str, float]:
    return learn(stop_gradient=True, epochs=30)


def test_knn_rises_above_random_initialization(healthy: dict[str, float]) -> None:
    assert healthy['knn'] > 0.93
    assert healthy['knn'] > healthy['random'] + 0.03


def test_training_collapses_without_stop_gradient(healthy: dict[str, float]) -> None:
    collapsed = learn(stop_gradient=False, epochs=20)
    assert collapsed['lowest'] < -0.98
    assert healthy['lowest'] > -0.95
    assert healthy['z_std'] > 0.95
    assert collapsed['z_std'] < healthy['z_std'] - 0.1
    assert collapsed['knn'] < healthy['knn'] - 0.02
    assert collapsed['knn'] < collapsed['random']
