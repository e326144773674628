"""Tests of methods/simsiam.py and training/ against PyTorch's values (tests/figures/simsiam.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from simsiam_jax.methods import simsiam
from simsiam_jax.models import resnet
from simsiam_jax.training import mesh as meshes
from simsiam_jax.training import optim, step

FIGURES = pathlib.Path(__file__).parent / 'figures' / 'simsiam.npz'
STEMS = {'resnet50': 'imagenet', 'resnet18': 'cifar'}
SIZES = {'resnet50': 32, 'resnet18': 8}
SEEDS = {'resnet50': 66, 'resnet18': 13}
BATCH, EPOCHS, STEPS_PER_EPOCH = 8, 3, 2
LEAVES = {'running_mean': 'mean', 'running_var': 'var', 'bias': 'bias'}


@pytest.fixture(
    scope='module',
    params=[('resnet50', 'plain'), ('resnet50', 'fused'), ('resnet18', 'plain')],
    ids=' '.join,
)
def variant(request):
    return request.param


@pytest.fixture(scope='module')
def network(variant):
    return variant[0]


@pytest.fixture(scope='module')
def figures(network):
    with np.load(FIGURES) as file:
        return {name.split('/')[1]: file[name] for name in file if name.startswith(network)}


def make_method(variant, axis_name=None):
    network, kernels = variant
    backbone = resnet.make(
        network,
        stem=STEMS[network],
        width_multiplier=4 / 64,
        stages=(1, 1),
        axis_name=axis_name,
        kernels=kernels,
    )
    return simsiam.make(backbone, dim=16, predictor_hidden_dim=8)


def make_views(network, step):
    """Returns the same views as figures/simsiam.py."""
    size = SIZES[network]
    raw = np.random.PCG64([SEEDS[network], step]).random_raw(2 * BATCH * size * size * 3 // 8)
    x = raw.astype('<u8').view(np.uint8).reshape(2, BATCH, size, size, 3).astype(np.float32)
    x = x / 128 - 1
    return list(x + x[:, :, :1, :1])


def to_flax(record):
    """Converts PyTorch's arrays to a Flax tree: OIHW -> HWIO, [out, in] -> [in, out]."""
    flat = {}
    for name in record.dtype.names:
        *path, leaf = name.split('.')
        array = record[name].astype(np.float32)
        if leaf == 'weight':
            leaf = 'scale' if array.ndim == 1 else 'kernel'
            array = array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T
        flat[*path, LEAVES.get(leaf, leaf)] = array
    return traverse_util.unflatten_dict(flat)


def init_stats(figures):
    """Returns means 0 and variances 1, the initial statistics of both libraries."""
    flat = traverse_util.flatten_dict(to_flax(figures['statistics']))
    start = {path: np.full_like(x, path[-1] == 'var') for path, x in flat.items()}
    return traverse_util.unflatten_dict(start)


def assert_close(actual, expected, name, scale=None, atol=0.0):
    """Asserts equality to 1e-4 of each entry or of `scale`, by default the array's largest entry.

    The entries of an array are sums over the same batch, of terms about as large as the largest
    entry. If the terms cancel, the rounding error still has the size of the terms.
    """
    scale = np.max(np.abs(expected)) if scale is None else scale
    np.testing.assert_allclose(
        actual, expected, rtol=1e-4, atol=1e-4 * scale + atol, err_msg=str(name)
    )


def assert_trees_close(actual, expected):
    actual, expected = traverse_util.flatten_dict(actual), traverse_util.flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        assert_close(array, expected[path], path)


def assert_statistics_close(batch_stats, figures, name, updates):
    """Asserts equal running statistics after a number of updates from mean 0 and variance 1.

    PyTorch's running variance averages unbiased variances, Flax's biased ones. Over n values, the
    unbiased variance is n/(n-1) times the biased one. The initial 1 is the same in both.
    """
    actual = traverse_util.flatten_dict(batch_stats)
    expected = traverse_util.flatten_dict(to_flax(figures[name]))
    assert actual.keys() == expected.keys()
    start = 0.9**updates
    for module in figures['counts'].dtype.names:
        path = tuple(module.split('.'))
        n = figures['counts'][module]
        var = start + (actual[*path, 'var'] - start) * n / (n - 1)
        assert_close(var, expected[*path, 'var'], path)
        # A mean may be 0, as before the predictor's BN, so the deviation is its scale.
        deviation = np.sqrt(np.max(var))
        assert_close(actual[*path, 'mean'], expected[*path, 'mean'], path, deviation)


@pytest.fixture(scope='module')
def first_step(variant, network, figures):
    method = make_method(variant)

    def loss_fn(params, views):
        outputs, batch_stats = step.forward_views(
            method.network, params, init_stats(figures), views
        )
        loss, _, _ = method.loss(outputs, outputs, None)
        return loss, (outputs, batch_stats)

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return grad_fn(to_flax(figures['weights']), make_views(network, 0))


@pytest.mark.parametrize('name', ['feature', 'z', 'p'])
def test_simsiam_outputs_match_pytorch(figures, first_step, name):
    (_, (outputs, _)), _ = first_step
    for i, view in enumerate(outputs, 1):
        assert_close(getattr(view, name), figures[f'{name}{i}'], f'{name}{i}')


def test_simsiam_loss_matches_pytorch(figures, first_step):
    (loss, _), _ = first_step
    # The tolerance is relative to the cosines, in [-1, 1], because their mean is near 0.
    np.testing.assert_allclose(loss, figures['losses'][0], rtol=1e-4, atol=1e-6)


def test_simsiam_gradients_match_pytorch(figures, first_step):
    _, gradients = first_step
    assert_trees_close(gradients, to_flax(figures['gradients']))


def test_running_statistics_match_pytorch(figures, first_step):
    (_, (_, batch_stats)), _ = first_step
    assert_statistics_close(batch_stats, figures, 'statistics', updates=2)


@pytest.fixture(scope='module')
def trained(variant, network, figures):
    """Returns the losses and the state of six steps on one device."""
    mesh = meshes.make_mesh(jax.devices()[:1])
    method = make_method(variant, meshes.DATA)
    tx, _ = optim.make(
        batch_size=BATCH,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        learning_rate=0.32,
        momentum=0.9,
        weight_decay=1e-4,
        by_epoch=True,
        predictor_schedule='constant',
    )
    params = jax.tree.map(jnp.asarray, to_flax(figures['weights']))
    state = step.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=init_stats(figures),
        opt_state=tx.init(params),
        target=None,
        method_state=None,
    )
    state = meshes.replicate(state, mesh)
    train_step = step.make_train_step(method, tx, mesh)
    losses = []
    for i in range(EPOCHS * STEPS_PER_EPOCH):
        state, metrics = train_step(state, meshes.shard(make_views(network, i), mesh))
        losses.append(float(metrics['loss']))
    return losses, state


def test_train_step_losses_match_pytorch(figures, trained):
    losses, _ = trained
    np.testing.assert_allclose(losses, figures['losses'], rtol=1e-4, atol=1e-6)


def test_train_step_weight_changes_match_pytorch(figures, trained):
    """Compares the changes of six steps, because a wrong weight decay is small beside weights."""
    _, state = trained
    actual = traverse_util.flatten_dict(jax.device_get(state.params))
    expected = traverse_util.flatten_dict(to_flax(figures['trained_weights']))
    start = traverse_util.flatten_dict(to_flax(figures['weights']))
    assert actual.keys() == expected.keys()
    for path, weight in start.items():
        # Each step rounds the weight itself, by up to half a unit in its last place.
        rounding = EPOCHS * STEPS_PER_EPOCH / 2 * np.spacing(np.max(np.abs(weight)))
        assert_close(actual[path] - weight, expected[path] - weight, path, atol=rounding)


def test_train_step_statistics_match_pytorch(figures, trained):
    _, state = trained
    updates = 2 * EPOCHS * STEPS_PER_EPOCH
    assert_statistics_close(
        jax.device_get(state.batch_stats), figures, 'trained_statistics', updates=updates
    )
