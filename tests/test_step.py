"""Tests of training/step.py, training/mesh.py and monitor.z_std: one and eight devices agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simsiam_jax.methods import simsiam
from simsiam_jax.methods.contract import Method
from simsiam_jax.models import resnet
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import monitor, step

pytestmark = pytest.mark.usefixtures('_compiled_quickly')
BATCH = 32


def small_method(**kwargs) -> Method:
    backbone = resnet.make(
        'resnet18',
        stem='cifar',
        width_multiplier=0.125,
        stages=(1, 1),
        axis_name=mesh_lib.DATA,
    )
    return simsiam.make(backbone, dim=16, predictor_hidden_dim=8, **kwargs)


def batches(n: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.standard_normal((BATCH, 8, 8, 3), np.float32) for _ in range(2)] for _ in range(n)]


def train(method: Method, tx: optax.GradientTransformation, devices: int, steps: int):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    state = mesh_lib.replicate(step.init_state(method, tx, 0, (8, 8, 3)), mesh)
    train_step = step.make_train_step(method, tx, mesh)
    states, metrics = [jax.device_get(state)], []
    for batch in batches(steps):
        state, values = train_step(state, mesh_lib.shard(batch, mesh))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def test_train_step_gradients_on_8_devices_match_1() -> None:
    # With SGD at rate 1 from the same weights, the difference of the weights is the gradient.
    method, tx = small_method(), optax.sgd(1.0)
    (before, one), (metrics_one,) = train(method, tx, 1, 1)
    (_, eight), (metrics_eight,) = train(method, tx, 8, 1)
    np.testing.assert_allclose(metrics_eight['loss'], metrics_one['loss'], rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics_eight['z_std'], metrics_one['z_std'], rtol=0, atol=1e-6)
    gradients = [jax.tree.map(np.subtract, before.params, s.params) for s in (one, eight)]
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients[0]))
    assert largest > 1e-2
    for g1, g8 in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(g8, g1, rtol=1e-5, atol=1e-5 * largest)
    for s1, s8 in zip(
        jax.tree.leaves(one.batch_stats), jax.tree.leaves(eight.batch_stats), strict=True
    ):
        np.testing.assert_allclose(s8, s1, rtol=1e-5, atol=1e-6)


def test_train_step_losses_on_8_devices_match_1() -> None:
    method, tx = small_method(), optax.sgd(0.05, momentum=0.9)
    states_one, metrics_one = train(method, tx, 1, 5)
    states_eight, metrics_eight = train(method, tx, 8, 5)
    assert states_one[-1].step == states_eight[-1].step == 5
    np.testing.assert_allclose(
        [m['loss'] for m in metrics_eight], [m['loss'] for m in metrics_one], atol=1e-5
    )


def test_forward_views_normalizes_each_view_separately() -> None:
    # The views have different means. In one batch, their average would update the statistics once.
    method = small_method()
    variables = method.network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    views = [jnp.full((4, 8, 8, 3), value) + batches(1)[0][0][:4] for value in (0.0, 5.0)]

    def conv_mean(view):
        kernel = variables['params']['backbone']['conv1']['kernel']
        x = jax.lax.conv_general_dilated(
            view, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return x.mean((0, 1, 2))

    network = small_method_without_axis().network
    _, stats = step.forward_views(network, variables['params'], variables['batch_stats'], views)
    expected = 0.9 * (0.1 * conv_mean(views[0])) + 0.1 * conv_mean(views[1])
    np.testing.assert_allclose(stats['backbone']['bn1']['mean'], expected, rtol=1e-4, atol=1e-6)


def small_method_without_axis() -> Method:
    backbone = resnet.make('resnet18', stem='cifar', width_multiplier=0.125, stages=(1, 1))
    return simsiam.make(backbone, dim=16, predictor_hidden_dim=8)


def test_stop_gradient_blocks_the_target_branch() -> None:
    gradients = []
    for stop in (True, False):
        method = small_method(stop_gradient=stop)
        outputs = [
            method.network.init_with_output(jax.random.key(i), jnp.ones((4, 8, 8, 3)), train=False)[
                0
            ]
            for i in range(2)
        ]

        def loss(zs, outputs=outputs, method=method):
            views = [o.replace(z=z) for o, z in zip(outputs, zs, strict=True)]
            return method.loss(views, views, None)[0]

        rng = np.random.default_rng(0)
        zs = [jnp.asarray(rng.standard_normal((4, 16), np.float32)) for _ in range(2)]
        gradients.append(max(jnp.abs(g).max() for g in jax.grad(loss)(zs)))
    assert gradients[0] == 0
    assert gradients[1] > 1e-3


def test_momentum_target_is_moving_average_of_weights() -> None:
    base = small_method()
    method = Method(base.network, base.loss, momentum=lambda step: 0.75)
    states, _ = train(method, optax.sgd(0.1), 1, 3)
    expected = states[0].params
    for state in states[1:]:
        expected = jax.tree.map(lambda t, w: 0.75 * t + 0.25 * w, expected, state.params)
    for actual, average in zip(
        jax.tree.leaves(states[-1].target['params']), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, average, rtol=1e-5, atol=1e-7)


def test_z_std_is_1_on_sphere_and_0_when_collapsed() -> None:
    rng = np.random.default_rng(0)
    spread = jnp.asarray(rng.standard_normal((4096, 64), np.float32))
    np.testing.assert_allclose(monitor.z_std(spread), 1.0, atol=0.01)
    collapsed = jnp.outer(rng.uniform(1, 2, 256), rng.standard_normal(64))
    np.testing.assert_allclose(monitor.z_std(collapsed), 0.0, atol=1e-6)


@pytest.mark.parametrize('devices', [1, 8])
def test_replicate_protects_state_from_donation(devices: int) -> None:
    method, tx = small_method(), optax.sgd(0.1)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    original = step.init_state(method, tx, 0, (8, 8, 3))
    state = mesh_lib.replicate(original, mesh)
    step.make_train_step(method, tx, mesh)(state, mesh_lib.shard(batches(1)[0], mesh))
    assert not any(x.is_deleted() for x in jax.tree.leaves(original))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize('batch_size', [0, 30])
def test_check_batch_size_rejects_batch_that_does_not_divide(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f'batch_size is {batch_size}.*8 devices'):
        mesh_lib.check_batch_size('batch_size', batch_size, mesh_lib.make_mesh())
