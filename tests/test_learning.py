"""Learning, measured on real images: the method works, and collapses where the paper says."""

import jax
import pytest
from configurations import load

from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step


def learn(*, stop_gradient: bool, epochs: int = 30) -> dict[str, float]:
    config = load('quickstart', epochs=epochs, method__stop_gradient=stop_gradient)
    parts = pretrain_setup.build(config, mesh_lib.make_mesh(jax.devices()[:1]))
    state = mesh_lib.replicate(parts.init(), parts.mesh)
    random = parts.knn(state)[0].top1
    train_step = step.make_train_step(parts.method, parts.tx, parts.mesh, parts.to_views)
    lowest = 0.0
    for batch in parts.batches(0, epochs * parts.sampler.steps_per_epoch):
        state, metrics = train_step(state, batch)
        lowest = min(lowest, float(metrics['loss']))
    return {
        'random': random,
        'knn': parts.knn(state)[0].top1,
        'z_std': float(metrics['z_std']),
        'lowest': lowest,
    }


@pytest.fixture(scope='module')
def healthy() -> dict[str, float]:
    return learn(stop_gradient=True)


def test_knn_rises_above_the_random_network(healthy: dict[str, float]) -> None:
    assert healthy['knn'] > 0.93
    assert healthy['knn'] > healthy['random'] + 0.03


def test_without_stop_gradient_it_collapses(healthy: dict[str, float]) -> None:
    collapsed = learn(stop_gradient=False)
    assert collapsed['lowest'] < -0.98
    assert healthy['lowest'] > -0.95
    assert healthy['z_std'] > 0.95
    assert collapsed['z_std'] < healthy['z_std'] - 0.1
    assert collapsed['knn'] < healthy['knn'] - 0.02
