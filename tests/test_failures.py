"""Tests of tasks/loop.py, tasks/memory.py and training/accumulate.py: divergence, memory limits."""

import dataclasses
import errno
import functools
import itertools
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data import array_files, sources
from simsiam_jax.methods import simsiam
from simsiam_jax.models import resnet
from simsiam_jax.tasks import loop, memory, pretrain
from simsiam_jax.training import classifier, step
from simsiam_jax.training import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('_compiled_quickly')


def small(**changes) -> ConfigDict:
    """Returns a configuration of a few steps on 256 digits, without evaluation."""
    config = config_lib.default()
    config.update_from_flattened_dict(
        {
            'batch_size': 64,
            'epochs': 3,
            'data.source': 'digits/train',
            'data.channels': 1,
            'augment.size': 8,
            'augment.saturation': 0.0,
            'augment.hue': 0.0,
            'augment.gray': 0.0,
            'augment.mean': (0.0,),
            'augment.std': (0.38,),
            'model.name': 'resnet18',
            'model.stem': 'cifar',
            'model.stages': (1,),
            'model.width_multiplier': 0.125,
            'model.dtype': 'float32',
            'method.dim': 16,
            'method.predictor_hidden_dim': 8,
            'eval.train': '',
            'eval.test': '',
            'log.tensorboard': False,
            'log.every_steps': 2,
            'checkpoint.every_epochs': 0.25,
        }
        | changes
    )
    return config


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = sources.open_source('digits/train')
    few = sources.ArraySource(digits.images[:256], digits.labels[:256], digits.classes)
    monkeypatch.setattr(sources, 'open_source', lambda spec, *arguments: few)


@pytest.mark.parametrize(('every', 'last'), [(0.25, 5), (3.0, None)])
def test_non_finite_loss_stops_run_and_keeps_last_good_step(
    every: float, last: int | None, tmp_path: pathlib.Path, monkeypatch
) -> None:
    make = step.make_train_step

    def poisoned(*args, **kwargs):
        train_step = make(*args, **kwargs)

        def at_step_6(state, batch):
            spoil = jnp.where(state.step == 5, jnp.nan, 1.0)
            state, metrics = train_step(state, batch)
            params = jax.tree.map(lambda x: x * spoil, state.params)
            return state.replace(params=params), metrics

        return at_step_6

    monkeypatch.setattr(step, 'make_train_step', poisoned)
    config = small(**{'checkpoint.every_epochs': every, 'log.every_steps': 4})
    with pytest.raises(errors.UserError) as caught:
        pretrain.run(config, str(tmp_path))
    text = str(caught.value)
    # The weights are not finite after step 6, and the loss from step 7. A save or log line notices.
    where = 'weights are not finite at step 6' if last else 'the loss is nan at step 7'
    assert where in text
    assert '(lr 0.009375, lr_predictor 0.0125, precision float32)' in text
    assert '\n' not in text
    steps = checkpoint_reader.list_steps(tmp_path / checkpoint_reader.FOLDER)
    assert max(steps, default=None) == last
    assert (f'step {last} is the last good checkpoint' if last else 'nothing is saved yet') in text


def test_storage_that_stays_away_ends_run_after_a_save(tmp_path, monkeypatch) -> None:
    with np.load(pathlib.Path(__file__).parent / 'figures' / 'cifar10.npz') as file:
        np.save(tmp_path / 'x.npy', file['train_images'][..., :1])
    source = array_files.open_npy(str(tmp_path / 'x.npy'))
    monkeypatch.setattr(sources, 'open_source', lambda spec, *arguments: source)
    config = small(
        **{
            'data.backend': 'host',
            'data.retry_seconds': 0.2,
            'batch_size': 16,
            'guard': 'off',
            'augment.blur': 0.0,
            'checkpoint.every_epochs': 0.0,
        }
    )
    read, reads = array_files.ArrayFileSource.read, itertools.count()

    def fail(self, index):
        if next(reads) > 300:  # of 432, some of which are ahead of the training
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(self, index)

    monkeypatch.setattr(array_files.ArrayFileSource, 'read', fail)
    with pytest.raises(errors.TemporaryError, match=r'Stale file handle.*Step \d+ is saved'):
        pretrain.run(config, str(tmp_path / 'run'))
    (step_,) = checkpoint_reader.list_steps(tmp_path / 'run' / checkpoint_reader.FOLDER)
    assert 0 < step_ < 27


def test_debug_nans_raises_at_the_first_nan_operation() -> None:
    def logarithm(x):
        return jnp.log(x).sum()

    def plain(state, batch):
        return state.replace(step=state.step + 1), {'loss': logarithm(batch)}

    params, none = {'backbone': {'w': jnp.ones(2)}}, {'backbone': {}}
    state = step.TrainState(jnp.zeros((), jnp.int32), params, none, None, None, None)
    watched = loop._raise_at_nan(jax.jit(plain, donate_argnums=0))
    state, metrics = watched(state, jnp.ones(3))
    assert metrics['loss'] == 0
    with pytest.raises(FloatingPointError) as caught:
        watched(state, -jnp.ones(3))  # not the first call, which JAX would look into by itself
    assert 'logarithm' in [entry.name for entry in caught.traceback]


def test_profile_writes_trace_of_given_steps(tmp_path: pathlib.Path, capsys) -> None:
    pretrain.run(small(epochs=1, profile='2:4'), str(tmp_path))
    assert 'wrote a trace of steps 2 to 3: ' in capsys.readouterr().out
    names = [path.name for path in (tmp_path / 'profile').rglob('*') if path.is_file()]
    assert any(name.endswith('.xplane.pb') for name in names)
    assert 'perfetto_trace.json.gz' in names
    with pytest.raises(errors.UserError, match="profile is '4:2'; expected START:STOP"):
        pretrain.run(small(profile='4:2'), str(tmp_path / 'other'))


def test_out_of_memory_error_lists_settings_to_change() -> None:
    def message(config: ConfigDict) -> str:
        with pytest.raises(errors.UserError) as caught, memory.oom_as_user_error(config):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes')
        return str(caught.value)

    text = message(small())
    settings = [
        'model.dtype=bfloat16',
        'model.remat=True',
        'optim.gradient_accumulation_steps=2',
        'batch_size (now 64',
    ]
    positions = [text.index(setting) for setting in settings]
    assert positions == sorted(positions)
    assert 'Try a smaller eval.batch_size (now 512) or more devices' in message(config_lib.knn())
    with pytest.raises(jax.errors.JaxRuntimeError), memory.oom_as_user_error(small()):
        raise jax.errors.JaxRuntimeError('INTERNAL: another failure')


def method(remat: bool = False, norm: bool = True):
    backbone = resnet.make(
        'resnet18',
        stem='cifar',
        width_multiplier=0.125,
        stages=(1, 1),
        axis_name=mesh_lib.DATA,
        remat=remat,
    )
    made = simsiam.make(backbone, dim=16, predictor_hidden_dim=8)
    if norm:
        return made
    return type(made)(Frozen(made.network), made.loss)


class Frozen(nn.Module):
    """A network with BN in evaluation mode, whose running averages no batch changes."""

    network: nn.Module

    def __call__(self, view, train: bool = True):
        return self.network(view, train=False)


@functools.cache
def update(remat: bool = False, norm: bool = True, accumulation_steps: int = 1, devices: int = 1):
    """Returns state, metrics and (estimated, compiled) memory of a step on 256 images."""
    made = method(remat, norm)
    tx, mesh = optax.sgd(1.0), mesh_lib.make_mesh(jax.devices()[:devices])
    initial = step.init_state(made, tx, 0, (8, 8, 3))
    # If the last scale of a block is zero, the block has no gradient.
    initial = initial.replace(params=jax.tree.map(lambda x: x + 0.1, initial.params))
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((256, 8, 8, 3), np.float32) for _ in range(2)]
    train_step = step.make_train_step(made, tx, mesh, accumulation_steps=accumulation_steps)
    given = (mesh_lib.replicate(initial, mesh), mesh_lib.shard(views, mesh))
    estimated, traced = memory.estimate(train_step, *given), train_step.trace(*given)
    compiled = traced.lower().compile()
    state, metrics = jax.device_get(compiled(*given))
    return state, metrics, (estimated, compiled.memory_analysis())


@pytest.mark.parametrize('devices', [1, 4])
def test_accumulated_gradients_match_a_single_batch(devices: int) -> None:
    whole, whole_metrics, _ = update(norm=False)
    parts, parts_metrics, _ = update(norm=False, accumulation_steps=4, devices=devices)
    assert abs(whole_metrics['loss'] - parts_metrics['loss']) < 1e-6
    moved = [np.abs(p - 0.1).max() for p in jax.tree.leaves(whole.params)]
    assert max(moved) > 1e-2
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)
    assert parts.step == 1


class Evaluating(resnet.ResNet):
    """A backbone with BN in evaluation mode, as in Frozen."""

    def __call__(self, x, train: bool = True):
        return super().__call__(x, train=False)


@pytest.mark.parametrize('frozen', [True, False], ids=['linear', 'finetune'])
def test_classifier_accumulation_matches_a_single_batch(frozen: bool) -> None:
    rng = np.random.default_rng(0)
    batch = {
        'view': rng.standard_normal((256, 8, 8, 3), np.float32),
        'label': rng.integers(0, 10, 256).astype(np.int32),
    }
    kind = resnet.ResNet if frozen else Evaluating
    made = resnet.make('resnet18', stem='cifar', width_multiplier=0.125, stages=(1,))
    own = [f.name for f in dataclasses.fields(made) if f.name not in ('parent', 'name')]
    backbone = kind(**{name: getattr(made, name) for name in own})
    variables = jax.device_get(backbone.init(jax.random.key(0), batch['view'][:1]))
    heads = classifier.init_heads(2, made.features, 10, 0)
    params = {'backbone': variables['params'], 'head': heads}
    tx, stats = optax.sgd(1.0), {'backbone': variables['batch_stats']}
    trained = {'head': heads} if frozen else params
    initial = step.TrainState(np.int32(0), params, stats, tx.init(trained), None, None)
    ends = []
    for parts, devices in ((1, 1), (4, 2)):
        mesh = mesh_lib.make_mesh(jax.devices()[:devices])
        train_step = classifier.make_train_step(
            backbone,
            tx,
            mesh,
            lambda batch: [batch['view']],
            frozen=frozen,
            accumulation_steps=parts,
        )
        state, metrics = train_step(mesh_lib.replicate(initial, mesh), mesh_lib.shard(batch, mesh))
        ends.append(jax.device_get((state.params, state.batch_stats, metrics)))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)
    for name, before in params.items():
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ends[0][0][name], before)
        assert (max(jax.tree.leaves(moved)) > 1e-3) == (name == 'head' or not frozen)


def test_accumulation_normalizes_each_part_by_its_own_statistics() -> None:
    whole, parts = update()[0], update(accumulation_steps=4)[0]
    means = [s.batch_stats['backbone']['bn1']['mean'] for s in (whole, parts)]
    # Two views move the running mean twice, four parts of each eight times: 1 - 0.9^2, 1 - 0.9^8.
    ratio = np.linalg.norm(means[1]) / np.linalg.norm(means[0])
    np.testing.assert_allclose(ratio, (1 - 0.9**8) / (1 - 0.9**2), rtol=0.3)


def test_batch_size_must_divide_by_devices_and_parts() -> None:
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batch_size('batch_size', 64, mesh, 4)
    with pytest.raises(
        errors.UserError, match=r'8 devices and optim.gradient_accumulation_steps=3 parts; use 48'
    ):
        mesh_lib.check_batch_size('batch_size', 64, mesh, 3)
    with pytest.raises(errors.UserError, match='gradient_accumulation_steps is 0; expected 1'):
        mesh_lib.check_batch_size('batch_size', 64, mesh, 0)


def test_remat_computes_the_same_update() -> None:
    (plain, plain_metrics, _), (again, again_metrics, _) = update(), update(remat=True)
    np.testing.assert_allclose(again_metrics['loss'], plain_metrics['loss'], rtol=0, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    # With remat, the blocks' inner values are not stored for the backward pass.
    image = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
    text = []
    for remat in (False, True):
        backbone = method(remat).network.backbone.clone(axis_name=None)
        variables = resnet.abstract_variables(backbone, 3)
        text.append(str(jax.make_jaxpr(lambda v, x, b=backbone: b.apply(v, x))(variables, image)))
    assert ('remat' in text[0] or 'checkpoint' in text[0]) is False
    assert 'remat' in text[1] or 'checkpoint' in text[1]


def test_memory_estimate_is_within_factor_two_of_compiled() -> None:
    changes = (
        {},
        {'remat': True},
        {'accumulation_steps': 4},
        {'accumulation_steps': 4, 'norm': False, 'devices': 4},
    )
    activations = []
    for change in changes:
        estimated, compiled = update(**change)[2]
        activations.append(estimated.activations)
        assert 0.5 < estimated.activations / compiled.temp_size_in_bytes < 2
        arguments = estimated.state + estimated.batch
        np.testing.assert_allclose(arguments, compiled.argument_size_in_bytes, rtol=0.01)
    assert activations[1] < 0.8 * activations[0]
    assert activations[3] < activations[2] < 0.4 * activations[0]


def test_too_large_step_is_reported_before_compilation(monkeypatch, capsys) -> None:
    made, config = jax.jit(lambda state, batch: (state @ batch).sum()), small()
    state, batch = jnp.ones((1024, 1024)), jnp.ones((1024, 2048))
    memory.announce(config, made, state, batch)
    assert capsys.readouterr().out == ''  # CPUs report no memory limit
    monkeypatch.setattr(memory, 'device_limit', lambda: 2**24)
    memory.announce(config, made, state, batch)
    output = capsys.readouterr().out
    # float32: 4 MiB, 8 MiB, and 8 MiB of the product.
    assert (
        '0.02 GiB per device (state 0.00, batch 0.01, activations 0.01); the device has 0.02'
        in output
    )
    assert 'warning: by this estimate, the run does not fit' in output
    assert 'model.dtype=bfloat16 (now float32), then model.remat=True' in output
    assert made._cache_size() == 0
    monkeypatch.setattr(memory, 'device_limit', lambda: 2**26)
    memory.announce(config, made, state, batch)
    assert 'warning' not in capsys.readouterr().out
