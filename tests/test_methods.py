"""Tests of methods/ and method_defaults.py: lightly's figures, any number of devices, resuming."""

import dataclasses
import inspect
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors, load_encoder, method_defaults
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.methods import METHODS, losses, moco, momentum
from simsiam_jax.methods.contract import ForwardFn, Method, forward
from simsiam_jax.models import resnet
from simsiam_jax.models.network import Outputs
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step

pytestmark = pytest.mark.usefixtures('_compiled_quickly')
FIGURES = pathlib.Path(__file__).parent / 'figures' / 'methods.npz'
MODEL = {'name': 'resnet18', 'stem': 'cifar', 'width_multiplier': 0.125, 'stages': (1,)}
BATCH, STEPS = 32, 10

SMALL = {
    'simsiam': {'dim': 16, 'predictor_hidden_dim': 8},
    'simclr': {'dim': 8, 'projector_hidden_dim': 16, 'temperature': 0.5},
    'moco_v2': {'dim': 8, 'projector_hidden_dim': 16, 'queue_size': 160, 'bn_group': 4},
    'byol': {'dim': 8, 'projector_hidden_dim': 16, 'predictor_hidden_dim': 16},
    'swav': {
        'dim': 8,
        'projector_hidden_dim': 16,
        'prototypes': 12,
        'frozen_steps': 2,
        'queue_size': 80,
    },
}
# Variants by arguments: gradients through gathered codes, a momentum target of SimSiam's heads.
VARIANTS: list[Any] = [
    *((name, {}) for name in SMALL),
    pytest.param('simsiam', {'momentum': 0.9}, marks=pytest.mark.long),
    pytest.param('simclr', {'predictor': True, 'stop_gradient': True}, marks=pytest.mark.long),
    # With epsilon 0.05 the gradients through assignments would amplify the rounding.
    (
        'swav',
        {
            'predictor': True,
            'stop_gradient': False,
            'frozen_steps': 0,
            'queue_size': 0,
            'sinkhorn_epsilon': 0.5,
        },
    ),
]


def make(name: str, axis_name: str | None = mesh_lib.DATA, **kwargs: Any) -> Method:
    backbone = resnet.make(**MODEL, axis_name=axis_name)
    return METHODS[name](backbone, **SMALL[name] | kwargs)


def batches(n: int) -> list[list[np.ndarray]]:
    """Returns n batches of two large views and a small one."""
    rng = np.random.default_rng(0)
    return [
        [rng.standard_normal((BATCH, size, size, 3), np.float32) for size in (8, 8, 6)]
        for _ in range(n)
    ]


def sgd(rate: float) -> optax.GradientTransformation:
    """Returns SGD whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(lambda g: -rate * g, grads), grads),
    )


def train(
    method: Method,
    devices: int,
    steps: int,
    rate: float = 0.02,
    parts: int = 1,
    merge_views: bool = False,
):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    state = mesh_lib.replicate(step.init_state(method, sgd(rate), 0, (8, 8, 3)), mesh)
    train_step = step.make_train_step(
        method,
        sgd(rate),
        mesh,
        total_steps=STEPS,
        accumulation_steps=parts,
        merge_views=merge_views,
    )
    states, values = [jax.device_get(state)], []
    for batch in batches(steps):
        state, metrics = train_step(state, mesh_lib.shard(batch, mesh))
        states.append(jax.device_get(state))
        values.append(float(metrics['loss']))
    return states, values


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that trees agree within `tolerance` of the largest entry of the whole tree."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    largest = max((np.abs(x).max() for x in expected if x.size), default=0)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize(('name', 'changes'), VARIANTS)
def test_method_on_8_devices_equals_1_device(name: str, changes: dict) -> None:
    method = make(name, **changes)
    steps = STEPS if (SMALL[name] | changes).get('queue_size') else 3  # a queue fits 2.5 steps
    states, values = train(method, 1, steps)
    states_8, values_8 = train(method, 8, steps)
    np.testing.assert_allclose(values_8[0], values[0], rtol=1e-5, atol=1e-6)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(states[1].opt_state))
    assert largest > 1e-2
    assert_trees_close(states_8[1].opt_state, states[1].opt_state, 2e-5)
    np.testing.assert_allclose(values_8, values, rtol=1e-3, atol=1e-4)
    assert np.ptp(values) > 1e-3
    for part in ('method_state', 'target', 'batch_stats'):
        assert_trees_close(getattr(states_8[-1], part), getattr(states[-1], part), 2e-3)


@pytest.mark.parametrize(
    ('name', 'kernels'), [('simsiam', 'fused'), ('moco_v2', 'plain'), ('swav', 'plain')]
)
def test_merged_views_give_the_same_step_with_fewer_operations(name: str, kernels: str) -> None:
    backbone = resnet.make(**MODEL, kernels=kernels, axis_name=mesh_lib.DATA)
    method = METHODS[name](backbone, **SMALL[name])
    states, values = train(method, 8, 2)
    merged, merged_values = train(method, 8, 2, merge_views=True)
    np.testing.assert_allclose(merged_values, values, rtol=1e-5, atol=1e-6)
    assert_trees_close(merged[1].opt_state, states[1].opt_state, 2e-5)
    for part in ('batch_stats', 'target', 'method_state'):
        assert_trees_close(getattr(merged[-1], part), getattr(states[-1], part), 1e-4)
    mesh = mesh_lib.make_mesh(jax.devices())
    batch = mesh_lib.shard(batches(1)[0][:2], mesh)
    one, two = (
        step.make_train_step(method, sgd(0.02), mesh, merge_views=merge)
        .lower(mesh_lib.replicate(states[0], mesh), batch)
        .as_text()
        for merge in (True, False)
    )
    assert 2 * one.count('stablehlo.convolution') == two.count('stablehlo.convolution') > 0
    assert one.count('stablehlo.all_reduce') < two.count('stablehlo.all_reduce')


@pytest.fixture(scope='module')
def figures() -> dict[str, dict[str, jax.Array]]:
    groups: dict[str, dict[str, jax.Array]] = {}
    with np.load(FIGURES) as file:
        for path in file:
            group, _, name = path.partition('/')
            groups.setdefault(group, {})[name] = jnp.asarray(file[path])
    return groups


def loss_and_gradients(method: Method, method_state: Any, online: dict, target: dict | None = None):
    """Returns loss, gradients of the online arrays [V, B, ...], and the new method state."""

    def outputs(arrays: dict) -> list[Outputs]:
        return [
            Outputs(feature=None, z=z, p=p, prototypes=arrays.get('prototypes'))
            for z, p in zip(arrays['z'], arrays.get('p', arrays['z']), strict=True)
        ]

    def loss(arrays: dict):
        views = outputs(arrays)
        targets = outputs(target) if target else views[:2]
        value, new_state, _ = method.loss(views, targets, method_state)
        return value, new_state

    (value, new_state), gradients = jax.value_and_grad(loss, has_aux=True)(online)
    return value, gradients, new_state


def test_simclr_loss_and_gradient_equal_lightly(figures) -> None:
    expected = figures['simclr']
    method = make('simclr', None, dim=6, temperature=0.1)
    loss, gradients, _ = loss_and_gradients(method, None, {'z': expected['z']})
    np.testing.assert_allclose(loss, expected['loss'], rtol=1e-5)
    np.testing.assert_allclose(gradients['z'], expected['gradient'], rtol=1e-5, atol=1e-5)


def test_moco_equals_lightly_until_queue_wraps_around(figures) -> None:
    expected = figures['moco']
    method = make('moco_v2', None, dim=6, queue_size=24)
    queue = expected['queue'][::-1]  # lightly removes its first rows first, we our last rows
    for i, (q, k) in enumerate(zip(expected['q'], expected['k'], strict=True)):
        loss, gradients, queue = loss_and_gradients(method, queue, {'z': q}, {'z': k})
        np.testing.assert_allclose(loss, expected['losses'][i], rtol=1e-5)
        np.testing.assert_allclose(gradients['z'], expected['gradient'][i], rtol=1e-5, atol=1e-5)
    assert queue.shape == (24, 6)


def test_byol_loss_and_gradient_equal_lightly(figures) -> None:
    expected = figures['byol']
    z = {'z': expected['z']}
    loss, gradients, _ = loss_and_gradients(
        make('byol', None, dim=6), None, {'p': expected['p']} | z, z
    )
    np.testing.assert_allclose(loss, expected['loss'], rtol=1e-5)
    np.testing.assert_allclose(gradients['p'], expected['gradient'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', ['swav', 'swav_multi_crop', 'swav_queue'])
def test_swav_loss_gradients_and_queue_equal_lightly(figures, case: str) -> None:
    expected = figures[case]
    queue = expected['queue']
    method = make('swav', None, dim=6, prototypes=5, frozen_steps=0, queue_size=queue.shape[1])
    online = {k: expected[k] for k in ('z', 'prototypes')}
    method_state = {'step': jnp.int32(100), 'queue': queue}
    loss, gradients, new_state = loss_and_gradients(method, method_state, online)
    np.testing.assert_allclose(loss, expected['loss'], rtol=1e-5)
    np.testing.assert_allclose(gradients['z'], expected['gradient'], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gradients['prototypes'], expected['prototypes_gradient'], rtol=1e-5, atol=1e-5
    )
    updated = method.project_params(
        {'prototypes': expected['prototypes'] - gradients['prototypes']}
    )
    np.testing.assert_allclose(updated['prototypes'], expected['prototypes_after'], atol=1e-5)
    if queue.size:
        rows = expected['z'][:2] / np.linalg.norm(expected['z'][:2], axis=-1, keepdims=True)
        np.testing.assert_allclose(
            new_state['queue'], np.concatenate([rows, queue[:, :-4]], axis=1), atol=1e-6
        )


def test_swav_queue_is_used_once_full_and_started(figures) -> None:
    expected = figures['swav_queue']
    online = {k: expected[k] for k in ('z', 'prototypes')}
    queue = expected['queue']  # three batches

    def loss(at: int, queue: Any = queue, start: int = 0) -> Any:
        method = make(
            'swav', None, dim=6, prototypes=5, frozen_steps=0, queue_size=12, queue_start=start
        )
        return loss_and_gradients(method, {'step': jnp.int32(at), 'queue': queue}, online)[0]

    without = make('swav', None, dim=6, prototypes=5, frozen_steps=0, queue_size=0)
    method_state = {'step': jnp.int32(0), 'queue': queue[:, :0]}
    unused, _, _ = loss_and_gradients(without, method_state, online)
    np.testing.assert_allclose(loss(3, queue.at[:, -1].set(0)), unused)
    np.testing.assert_allclose(loss(3), expected['loss'], rtol=1e-5)
    np.testing.assert_allclose(loss(4, start=5), unused)
    np.testing.assert_allclose(loss(5, start=5), expected['loss'], rtol=1e-5)


def test_sinkhorn_equals_lightly_and_does_not_overflow(figures) -> None:
    scores, q = figures['sinkhorn']['scores'], figures['sinkhorn']['q']
    actual = losses.sinkhorn(scores, epsilon=0.05, iterations=3)
    np.testing.assert_allclose(actual, q, rtol=1e-4, atol=1e-6)
    # exp(1/0.005) overflows float32.
    sharp = losses.sinkhorn(scores, epsilon=0.005, iterations=100)
    np.testing.assert_allclose(sharp.sum(1), 1, rtol=1e-5)
    assert sharp.max() > 0.99


def test_swav_prototypes_freeze_at_first_and_keep_norm_1() -> None:
    states, _ = train(make('swav'), 1, 4)
    prototypes = [state.params['prototypes']['centers'] for state in states]
    for weights in prototypes:
        np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(prototypes[2], prototypes[0], atol=1e-6)
    assert np.abs(prototypes[3] - prototypes[2]).max() > 1e-4


class PixelMeans(nn.Module):
    """A backbone that compiles in no time."""

    axis_name: str | None

    @nn.compact
    def __call__(self, view: Any, train: bool) -> Any:
        bn = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
        return bn(view.mean((1, 2)))


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[] if n == 'swav' else pytest.mark.long) for n in SMALL]
)
def test_method_counts_steps_not_parts_of_an_accumulated_batch(name: str) -> None:
    method = make(name)
    backbone = PixelMeans(method.network.backbone.axis_name)
    method = dataclasses.replace(method, network=method.network.clone(backbone=backbone))
    states, _ = train(method, 1, 3, parts=4)
    for i, state in enumerate(states):
        counters = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.integer)]
        assert counters == [i] * (2 if name == 'swav' else 1)
    if name == 'swav':
        prototypes = [state.params['prototypes']['centers'] for state in states]
        np.testing.assert_allclose(prototypes[2], prototypes[0], atol=1e-6)  # frozen for 2 steps
        assert np.abs(prototypes[3] - prototypes[2]).max() > 1e-4
        filled = [np.abs(state.method_state['queue']).any((0, 2)).sum() for state in states]
        assert filled == [0, BATCH, 2 * BATCH, 80]
    if name == 'moco_v2':
        before, after = states[0].method_state, states[1].method_state
        np.testing.assert_array_equal(after[2 * BATCH :], before[: -2 * BATCH])
    if name == 'byol':  # the target moves once a step, at the momentum of that step
        m = [float(method.momentum(i / STEPS)) for i in range(3)]
        expected = states[0].params
        for share, state in zip(m, states[1:], strict=True):
            expected = jax.tree.map(
                lambda t, w, share=share: share * t + (1 - share) * w, expected, state.params
            )
        assert_trees_close(states[-1].target['params'], expected, 1e-5)


def test_target_equals_closed_form_of_moving_average() -> None:
    states, _ = train(make('byol', momentum=0.6), 1, STEPS)
    done = np.arange(STEPS) / STEPS
    m = 1 - (1 - 0.6) * (np.cos(np.pi * done) + 1) / 2
    # t_n = sum over i of w_i (1 - m_i) m_(i+1) ... m_n, and the first weights times all m.
    shares = [np.prod(m)] + [(1 - m[i]) * np.prod(m[i + 1 :]) for i in range(STEPS)]
    assert sum(shares) == pytest.approx(1)
    expected = jax.tree.map(
        lambda *w: sum(s * x for s, x in zip(shares, w, strict=True)),
        *(state.params for state in states),
    )
    assert_trees_close(states[-1].target['params'], expected, 1e-5)


def test_cosine_momentum_schedule_rises_to_1() -> None:
    schedule = momentum.cosine_momentum_schedule(0.99)
    np.testing.assert_allclose([schedule(x) for x in (0.0, 0.5, 1.0)], [0.99, 0.995, 1.0])


@pytest.mark.parametrize(('name', 'changes'), [('byol', {}), ('simsiam', {'momentum': 0.9})])
def test_loss_gives_target_network_no_gradient(name: str, changes: dict) -> None:
    # In the first step the target has the online weights, so a leak would change their gradient.
    states, _ = train(make(name, **changes), 1, 1)
    method, views = make(name, None, **changes), jax.tree.map(jnp.asarray, batches(1)[0])

    def loss(params: Any, through_target: bool) -> Any:
        def outputs(params: Any, views: list) -> Any:
            return step.forward_views(method.network, params, states[0].batch_stats, views)[0]

        target = outputs(params if through_target else states[0].params, views[:2])
        return method.loss(outputs(params, views), target, None)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    without, leaked = (gradient(states[0].params, leak) for leak in (False, True))
    assert_trees_close(states[1].opt_state, without, 1e-5)
    if name == 'byol':  # SimSiam's loss has another stop-gradient
        difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), without, leaked)
        assert max(jax.tree.leaves(difference)) > 1e-2


def test_moco_bn_groups_have_separate_statistics() -> None:
    method = make('moco_v2', None)
    state = step.init_state(method, sgd(1.0), 0, (8, 8, 3))
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    (view, *_), key = batches(1)[0], jax.random.key(0)
    view = jnp.asarray(view + np.linspace(0, 5, BATCH, dtype=np.float32)[:, None, None, None])

    def run(forward_fn: ForwardFn, view: Any = view) -> Any:
        return jax.jit(forward_fn, static_argnums=0)(method.network, variables, view, key)

    outputs, stats = run(method.online_forward)
    apart = [run(forward, group) for group in jnp.split(view, 8)]
    np.testing.assert_allclose(
        outputs.z, np.concatenate([o.z for o, _ in apart]), rtol=1e-4, atol=1e-5
    )
    mean = jax.tree.map(lambda *x: sum(x) / 8, *(s for _, s in apart))
    assert_trees_close(stats, mean, 1e-5)
    together, _ = run(forward)
    assert jnp.abs(together.z - outputs.z).max() > 0.01
    # Keys have different groups but the same order of images.
    keys, _ = run(method.target_forward)
    assert jnp.abs(keys.z - outputs.z).max() > 0.01
    restored, _ = run(moco.shuffled_forward(forward, None))
    np.testing.assert_allclose(restored.z, together.z, rtol=1e-4, atol=1e-5)


def test_moco_bn_group_must_divide_batch_of_device() -> None:
    with pytest.raises(
        errors.UserError, match=r'bn_group is 5; expected a divisor of the 32 images of each device'
    ):
        train(make('moco_v2', bn_group=5), 1, 1)


def run_config(name: str) -> dict[str, Any]:
    return {
        'method': {'name': name, **SMALL[name]},
        'model': MODEL,
        'data': {'channels': 3},
        'batch_size': BATCH,
    }


@pytest.mark.parametrize('name', SMALL)
def test_method_resumes_bit_for_bit_and_loads_encoder(name: str, tmp_path: pathlib.Path) -> None:
    method, tx = make(name), optax.sgd(0.02, momentum=0.9)
    mesh = mesh_lib.make_mesh(jax.devices()[:2])
    train_step = step.make_train_step(method, tx, mesh, total_steps=4)

    def start(seed: int) -> step.TrainState:
        return mesh_lib.replicate(step.init_state(method, tx, seed, (8, 8, 3)), mesh)

    def continue_training(state: step.TrainState, first: int, last: int) -> step.TrainState:
        for batch in batches(last)[first:]:
            state, _ = train_step(state, mesh_lib.shard(batch, mesh))
        return state

    with checkpoint.open(str(tmp_path), run_config(name), max_to_keep=1) as checkpoints:
        half = continue_training(start(0), 0, 2)
        checkpoints.save(half)
    whole = continue_training(half, 2, 4)
    with checkpoint.open(str(tmp_path), run_config(name), max_to_keep=1) as again:
        resumed = continue_training(again.restore(start(1)), 2, 4)
        again.save(resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert (resumed.target is None) == (method.momentum is None)

    module, variables = load_encoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, variables, checkpoint.encoder_variables(resumed))
    assert module.apply(variables, np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 8)


def test_checkpoint_refuses_run_of_different_method(tmp_path: pathlib.Path) -> None:
    method, tx = make('byol'), optax.sgd(0.1)
    with checkpoint.open(str(tmp_path), run_config('byol'), max_to_keep=1) as checkpoints:
        checkpoints.save(step.init_state(method, tx, 0, (8, 8, 3)).replace(step=jnp.int32(1)))
    with pytest.raises(errors.UserError) as caught:
        checkpoint.open(str(tmp_path), run_config('swav'), max_to_keep=1).__enter__()
    message = str(caught.value)
    assert "a different configuration: method.name ('byol' -> 'swav'). Revert" in message
    assert '\n' not in message


@pytest.mark.parametrize('name', SMALL)
def test_method_defaults_equal_defaults_of_constructor(name: str) -> None:
    config = config_lib.default()
    method_defaults.set_method(config, name)
    given = config.method.to_dict()
    assert given.pop('name') == name
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(METHODS[name]).parameters.items()
        if key != 'backbone'
    }
    assert given == defaults


def test_set_method_suggests_name_for_unknown_method() -> None:
    with pytest.raises(errors.UserError, match=r"unknown method 'moco'; did you mean moco_v2\?"):
        method_defaults.set_method(ConfigDict(), 'moco')
