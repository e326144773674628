"""Tests of tasks/diagnosis.py and tasks/collapse_callback.py: causes, warnings, pinned steps."""

import dataclasses
import pathlib
from unittest import mock

import corruptions
import guard_table
import jax.numpy as jnp
import pytest
from configurations import load
from guard_table import BEFORE, HEALTHY, NARROW
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, weights
from simsiam_jax.data import sources
from simsiam_jax.logs import writers
from simsiam_jax.tasks import collapse_callback, diagnosis, pretrain, pretrain_setup
from simsiam_jax.training import guard, monitor
from simsiam_jax.training import mesh as mesh_lib

DATA = diagnosis.DatasetStats(images=1437, duplicates=0.0)
STATE = corruptions.state_at(0)


@pytest.mark.parametrize(
    ('name', 'change', 'now', 'data', 'first', 'remedy'),
    [
        ('stop-gradient off', {}, NARROW, DATA, None, 'method.stop_gradient=True'),
        ('no predictor', {}, NARROW, DATA, None, 'method.predictor=True'),
        ('fixed predictor', {}, NARROW, DATA, None, 'optim.predictor_schedule=constant'),
        ('no BN in the heads', {}, NARROW, DATA, None, 'method.projector_output_bn=True'),
        ('rate x 30', {}, HEALTHY, DATA, None, 'optim.learning_rate=0.05'),
        ('batch 8', {}, NARROW, DATA, None, 'batch_size=64'),
        (
            'constant views',
            {'method.stop_gradient': False},
            dataclasses.replace(HEALTHY, view_distance=0.0),
            DATA,
            None,
            'augment.crop_scale=0.2,1.0',
        ),
        (
            'identical images',
            {'method.predictor': False},
            NARROW,
            diagnosis.DatasetStats(images=1437, duplicates=1.0),
            None,
            'other images',
        ),
        (
            'simsiam, seed 0',
            {'batch_size': 1024, 'optim.learning_rate': 0.1},
            NARROW,
            DATA,
            'a batch of 1024 starts without warm-up',
            'optim.warmup_epochs=10',
        ),
        ('simsiam, seed 0', {}, NARROW, DATA, 'the learning rate, base 0.8', 'learning_rate=0.2'),
        (
            'simsiam, seed 0',
            {},
            dataclasses.replace(NARROW, view_distance=0.2),
            DATA,
            'the augmentation is weak',
            'augment.jitter=0.8',
        ),
        (
            'moco_v2',
            {'method.bn_group': 4},
            NARROW,
            DATA,
            'BN statistics are computed over only 4 images',
            'method.bn_group=32',
        ),
    ],
)
def test_causes_start_with_the_most_likely(
    name: str,
    change: dict,
    now: monitor.RepresentationMetrics,
    data: diagnosis.DatasetStats,
    first: str | None,
    remedy: str,
) -> None:
    case = guard_table.CASES[name]
    config = load(f'quickstart:{case.method}')
    config.update_from_flattened_dict(case.change | change)
    likeliest = diagnosis.causes(config, now, data)[0]
    assert (first or case.cause) in likeliest.text
    assert remedy in likeliest.remedy


def test_causes_include_small_network_for_many_images() -> None:
    many = diagnosis.DatasetStats(images=1_000_000, duplicates=0.0)
    config = load('quickstart', model__width_multiplier=1.0)
    assert any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, many))
    assert not any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, DATA))
    config.model.name = 'resnet50'
    assert not any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, many))


def test_causes_suggest_valid_overrides() -> None:
    collapsing = {'method.stop_gradient': False, 'method.predictor': False} | guard_table.NO_BN
    config = load('quickstart', **collapsing, batch_size=8, optim__learning_rate=99.0)
    same = dataclasses.replace(NARROW, view_distance=0.0)
    given = [
        word.removeprefix('--config.').partition('=')
        for cause in diagnosis.causes(config, same, DATA)
        for word in cause.remedy.split()
    ]
    assert len(given) > 8
    for key, _, value in given:
        assert value
        config.update_from_flattened_dict({key: config_value(config, key, value)})


def config_value(config: ConfigDict, key: str, value: str) -> object:
    """Returns the value as the command line parses it."""
    old = config
    for part in key.split('.'):
        old = old[part]
    if isinstance(old, tuple):
        return tuple(float(x) for x in value.split(','))
    return value == 'True' if isinstance(old, bool) else type(old)(value)


def test_sample_dataset_counts_near_duplicates() -> None:
    digits = sources.open_source('digits/train')
    assert diagnosis.sample_dataset(digits).duplicates == 0
    digits.images[::2] = digits.images[0]
    digits.images[0] ^= 1  # one level away
    assert diagnosis.sample_dataset(digits).duplicates == pytest.approx(0.5, abs=0.1)


def callback_of(
    config: ConfigDict, measurements: list[monitor.RepresentationMetrics], late: int = 0
) -> tuple[collapse_callback.CollapseCallback, mock.Mock, mock.Mock]:
    """Returns a callback whose guard returns these measurements, its checkpoints and its log."""
    monitored = mock.create_autospec(guard.Guard, instance=True)
    monitored.measure.return_value = BEFORE
    monitored.update.side_effect = [lambda now=now: now for now in measurements]
    monitored.ready.side_effect = lambda step: step + late
    checkpoints = mock.create_autospec(checkpoint.Checkpoints, instance=True)
    checkpoints.pin.side_effect = lambda step: step
    log = mock.create_autospec(writers.MetricWriter, instance=True)
    source = sources.open_source('digits/train')
    callback = collapse_callback.CollapseCallback(config, monitored, source, checkpoints, log)
    callback.on_train_begin(STATE, [], 0)
    return callback, checkpoints, log


def test_callback_warns_once_and_pins_healthy_checkpoint(capsys: pytest.CaptureFixture) -> None:
    config = load('quickstart', method__stop_gradient=False)
    measurements = [HEALTHY, NARROW, HEALTHY, NARROW, NARROW, NARROW, NARROW]
    callback, checkpoints, log = callback_of(config, measurements)
    for step in range(10, 80, 10):
        callback(step, STATE, None, {'loss': jnp.float32(-0.97)})
    # The first sign disappears; the second stays.
    assert [call.args for call in checkpoints.pin.call_args_list] == [(10,), (None,), (30,)]
    assert [call.args[0] for call in log.scalars.call_args_list] == list(range(0, 80, 10))
    assert log.scalars.call_args.args[1]['guard/z_std'] == NARROW.z_std
    output = capsys.readouterr().out
    assert output.count('warning: complete collapse at step 60: loss -0.9700') == 1
    assert output.count('warning') == 1
    assert 'z_std 0.4 (0.98)' in output
    assert '1. the stop-gradient is off: --config.method.stop_gradient=True' in output
    assert 'checkpoint 30, from before the collapse, is kept' in output


@pytest.mark.parametrize('late', [5, 100])  # before and after the next measurement
def test_callback_reports_the_measured_step(late: int, capsys: pytest.CaptureFixture) -> None:
    callback, _, log = callback_of(load('quickstart'), [NARROW] * 4, late)
    callback._guard.update.side_effect = [
        (lambda: NARROW) if i % 10 == 0 else None for i in range(46)
    ]
    for step in range(10, 46):
        callback(step, STATE, None, {'loss': jnp.float32(-step / 100)})
    assert [call.args[0] for call in log.scalars.call_args_list] == [
        0,
        10,
        20,
        30,
        *[40] * (late == 5),
    ]
    assert 'complete collapse at step 30: loss -0.3000' in capsys.readouterr().out


def test_resumed_callback_compares_with_first_measurement(tmp_path: pathlib.Path) -> None:
    config, measured = load('quickstart'), []
    for step, now in ((0, BEFORE), (20, NARROW), (40, NARROW)):
        if step == 40:  # the log is lost
            (tmp_path / 'metrics.jsonl').unlink()
        monitored = mock.create_autospec(guard.Guard, instance=True)
        monitored.measure.return_value = now
        monitored.update.return_value = lambda now=now: now
        monitored.ready.side_effect = lambda step: step
        checkpoints = mock.create_autospec(checkpoint.Checkpoints, instance=True)
        source = sources.open_source('digits/train')
        with writers.MetricWriter(str(tmp_path), tensorboard=False, step=step) as log:
            callback = collapse_callback.CollapseCallback(
                config, monitored, source, checkpoints, log
            )
            callback.on_train_begin(STATE, [], step)
            callback(step + 10, STATE, None, {'loss': jnp.float32(-0.9)})
        assert callback.first_and_last is not None
        measured.append(callback.first_and_last[0])
    for values, expected in zip(measured, (BEFORE, BEFORE, NARROW), strict=True):
        assert dataclasses.asdict(values) == pytest.approx(dataclasses.asdict(expected), rel=1e-6)


def test_resumed_run_compares_with_weights_it_started_from(monkeypatch, capsys) -> None:
    config = load('quickstart', init_from='runs/first')
    setup = mock.Mock(pretrain_setup.PretrainSetup, mesh=mesh_lib.make_mesh(), init=lambda: STATE)
    resumed = mock.Mock(checkpoint.Checkpoints, start_step=7)
    loaded = corruptions.state_at(5)
    monkeypatch.setattr(weights, 'open_weights', lambda path: path)
    monkeypatch.setattr(weights, 'load_into_state', lambda state, given: (loaded, given))
    state, origin = pretrain._initial_state(config, setup, resumed, 'runs/second')
    corruptions.same(state.params, loaded.params)
    assert origin == 'before training'

    monkeypatch.setattr(weights, 'open_weights', mock.Mock(side_effect=errors.UserError('gone')))
    state, origin = pretrain._initial_state(config, setup, resumed, 'runs/second')
    corruptions.same(state.params, STATE.params)
    assert origin == 'random initialization'
    assert 'warning: gone; comparing with a random' in capsys.readouterr().out
    resumed.start_step = None  # a new run needs them
    with pytest.raises(errors.UserError, match='gone'):
        pretrain._initial_state(config, setup, resumed, 'runs/second')
