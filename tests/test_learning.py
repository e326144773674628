"""Tests that SimSiam learns on real images, and collapses without stop-gradient as in the paper."""

import json
import pathlib

import jax
import numpy as np
import pytest
from configurations import load
from sklearn.neighbors import KNeighborsClassifier

from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.pages import runs
from simsiam_jax.tasks import pretrain, pretrain_setup
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step

CIFAR10 = pathlib.Path(__file__).parent / 'figures' / 'cifar10.npz'  # 150 + 50 images


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


@pytest.mark.usefixtures('_compiled_quickly')
def test_photographs_in_arrays_train_and_are_judged(tmp_path) -> None:
    config = load(f'cifar10:small,npz:{CIFAR10}', batch_size=48, epochs=6, guard='off')
    config.update_from_flattened_dict(
        {
            'model.stem': 'imagenet',
            'model.stages': (1, 1),
            'model.width_multiplier': 0.125,
            'eval.every_epochs': 0,
            'log.tensorboard': False,
            'log.report': False,
        }
    )
    pretrain.run(config, str(tmp_path))
    losses = [loss for _, loss in runs.read_curves(tmp_path)['train/loss']]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    verdict = json.loads((tmp_path / 'verdict.json').read_text())
    assert (verdict['classes'], verdict['images']) == (10, 50)
    # The kNN of scikit-learn on the same pixels, with the same votes.
    with np.load(CIFAR10) as file:
        pixels = [file[f'{split}_images'].reshape(-1, 3072) / 255.0 for split in ('train', 'test')]
        labels = [file[f'{split}_labels'] for split in ('train', 'test')]
    classifier = KNeighborsClassifier(
        config.eval.k, metric='cosine', weights=lambda d: np.exp((1 - d) / config.eval.temperature)
    )
    expected = classifier.fit(pixels[0], labels[0]).score(pixels[1], labels[1])
    assert verdict['accuracy']['raw pixels']['top1'] == pytest.approx(expected)
