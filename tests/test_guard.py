"""The guard: its measures by hand, its judgment on staged collapses, what it says and keeps."""

import dataclasses
import json
import math
import pathlib
import runpy
from unittest import mock

import guard_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configurations import load
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data import sources
from simsiam_jax.logs import writers
from simsiam_jax.models.network import Outputs
from simsiam_jax.tasks import collapse_callback, diagnosis, pretrain, pretrain_setup
from simsiam_jax.training import guard, monitor
from simsiam_jax.training import mesh as mesh_lib

HERE = pathlib.Path(__file__).parent
corruptions = runpy.run_path(str(HERE / 'faults' / 'corruptions.py'))

BEFORE = monitor.RepresentationMetrics(
    rank=40.0,
    z_std=0.98,
    alignment=1.8,
    uniformity=-3.6,
    dead_channels=0.0,
    loss_floor=-0.3,
    view_distance=0.8,
)
HEALTHY = dataclasses.replace(BEFORE, rank=26.0, alignment=0.2, uniformity=-2.0)
NARROW = dataclasses.replace(HEALTHY, z_std=0.4, rank=30.0, uniformity=-0.2)
DATA = diagnosis.DatasetStats(images=1437, duplicates=0.0)
STATE = corruptions['state_at'](0)


def test_measures_of_eight_devices_are_those_by_hand() -> None:
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((16, 2, 2, 1)).astype(np.float32) for _ in range(2)]
    features = [rng.standard_normal((16, 6)).astype(np.float32) for _ in range(2)]
    for feature in features:
        feature[:, 0], feature[:, 1] = 3.0, 0.0  # neither tells anything
        feature[:, 2] = feature[:, 3]
    z = [rng.standard_normal((16, 5)).astype(np.float32) + 1 for _ in range(2)]

    def moments(views, features, z):
        outputs = [Outputs(feature=f, z=x, p=None) for f, x in zip(features, z, strict=True)]
        return monitor.moments(views, outputs, mesh_lib.DATA)

    mesh = mesh_lib.make_mesh()
    spread = jax.shard_map(moments, mesh=mesh, in_specs=P(mesh_lib.DATA), out_specs=P())
    found = monitor.summary(jax.device_get(jax.jit(spread)(views, features, z)))

    both = np.concatenate(features).astype(np.float64)
    share = np.linalg.svd(both, compute_uv=False)[:5] / np.linalg.svd(both, compute_uv=False).sum()
    assert found.rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert found.dead_channels == pytest.approx(2 / 6)
    z1, z2 = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in z)
    assert found.alignment == pytest.approx(np.mean(np.sum((z1 - z2) ** 2, 1)), rel=1e-5)
    cosine = np.mean(np.sum(z1 * z2, 1))
    assert found.loss_floor == pytest.approx(-np.sqrt(cosine), rel=1e-5)
    squares = [np.sum((z1[i] - z1[j]) ** 2) for i in range(16) for j in range(16) if i != j]
    assert found.uniformity == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(squares)))), 1e-5)
    v1, v2 = (view.reshape(16, -1) for view in views)
    ratio = np.mean((v1 - v2) ** 2) / (2 * np.mean(v1.var(0)))
    assert found.view_distance == pytest.approx(math.sqrt(ratio), rel=1e-5)


def test_effective_rank_at_known_points() -> None:
    assert monitor.effective_rank(np.eye(7)) == pytest.approx(7)
    # What float32 leaves of the directions that are empty does not count.
    one = np.ones((512, 512), np.float32)
    noise = np.random.default_rng(0).standard_normal(one.shape).astype(np.float32) * 1e-7
    rounded = (one + noise + noise.T).astype(np.float64)
    assert np.linalg.matrix_rank(rounded) > 100
    assert monitor.effective_rank(rounded) == pytest.approx(1)


@pytest.mark.parametrize(
    ('now', 'verdict'),
    [
        (HEALTHY, guard.HEALTHY),
        (NARROW, guard.COMPLETE),
        (dataclasses.replace(HEALTHY, rank=15.0), guard.PARTIAL),
        (dataclasses.replace(HEALTHY, uniformity=-0.8), guard.PARTIAL),
        (dataclasses.replace(HEALTHY, view_distance=0.05), guard.TRIVIAL),
    ],
)
def test_a_sign_is_believed_when_it_stays(now: monitor.RepresentationMetrics, verdict: str) -> None:
    assert guard.diagnose([BEFORE, now, now, now]) == verdict
    assert guard.diagnose([BEFORE, now, now]) == guard.HEALTHY
    assert guard.diagnose([BEFORE, now, HEALTHY, now, now]) == guard.HEALTHY
    assert guard.diagnose([BEFORE, *[HEALTHY] * 9, now, now, now]) == verdict


def test_what_spreads_again_is_not_collapsing() -> None:
    # z_std of MoCo v2 on digits, which has no BN in its head.
    path = [0.44, 0.12, 0.14, 0.36, 0.57, 0.65]
    history = [dataclasses.replace(NARROW, z_std=z_std) for z_std in path]
    for end in range(1, len(history) + 1):
        assert guard.diagnose(history[:end]) == guard.HEALTHY
    assert guard.diagnose([*history[:3], *history[1:3], history[2]]) == guard.COMPLETE


def test_measurements_are_early_then_rare() -> None:
    config = load('quickstart')
    parts = pretrain_setup.build(config, mesh_lib.make_mesh(jax.devices()[:1]))
    for batch_size, last, first in ((128, 2200, [10, 20, 40, 50, 100]), (16, 800, [40, 80, 160])):
        measuring = guard.Guard(
            parts.method, parts.mesh, parts.to_views, batch_size=batch_size, last=last
        )
        due = [number for number in range(last + 1) if measuring.due(number)]
        assert due[: len(first)] == first
        assert len(due) * measuring.batches / 3 < 0.02 * last


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
            "BN's statistics are of 4 images",
            'method.bn_group=32',
        ),
    ],
)
def test_the_first_cause(
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
    found = diagnosis.causes(config, now, data)
    assert (first or case.cause) in found[0].text
    assert remedy in found[0].remedy


def test_a_small_network_is_named_where_there_are_many_images() -> None:
    many = diagnosis.DatasetStats(images=1_000_000, duplicates=0.0)
    config = load('quickstart', model__width_multiplier=1.0)
    assert any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, many))
    assert not any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, DATA))
    config.model.name = 'resnet50'
    assert not any('Li et al.' in cause.text for cause in diagnosis.causes(config, NARROW, many))


def test_every_override_that_is_named_can_be_given() -> None:
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
    """As the command line reads it."""
    old = config
    for part in key.split('.'):
        old = old[part]
    if isinstance(old, tuple):
        return tuple(float(x) for x in value.split(','))
    return value == 'True' if isinstance(old, bool) else type(old)(value)


def test_near_duplicates_are_counted() -> None:
    digits = sources.open_source('digits/train')
    assert diagnosis.sample_dataset(digits).duplicates == 0
    digits.images[::2] = digits.images[0]
    digits.images[0] ^= 1  # one level away
    assert diagnosis.sample_dataset(digits).duplicates == pytest.approx(0.5, abs=0.1)


def watch_of(
    config: ConfigDict, measures: list
) -> tuple[collapse_callback.CollapseCallback, mock.Mock, mock.Mock]:
    """A watch that is given these measurements at steps 10, 20, ..."""
    measuring = mock.create_autospec(guard.Guard, instance=True)
    measuring.measure.return_value = BEFORE
    measuring.see.side_effect = measures
    checkpoints = mock.create_autospec(checkpoint.Checkpoints, instance=True)
    checkpoints.pin.side_effect = lambda step: step
    log = mock.create_autospec(writers.MetricWriter, instance=True)
    source = sources.open_source('digits/train')
    watching = collapse_callback.CollapseCallback(config, measuring, source, checkpoints, log)
    watching.begin(STATE, [], 0)
    return watching, checkpoints, log


def test_a_collapse_is_told_once_and_what_was_before_it_is_held(
    capsys: pytest.CaptureFixture,
) -> None:
    config = load('quickstart', method__stop_gradient=False)
    seen = [HEALTHY, NARROW, HEALTHY, NARROW, NARROW, NARROW, NARROW]
    watching, checkpoints, log = watch_of(config, seen)
    for number in range(10, 80, 10):
        watching(number, STATE, None, {'loss': jnp.float32(-0.97)})
    # The first sign passes; the second stays.
    assert [call.args for call in checkpoints.pin.call_args_list] == [(10,), (None,), (30,)]
    assert [call.args[0] for call in log.scalars.call_args_list] == list(range(0, 80, 10))
    assert log.scalars.call_args.args[1]['guard/z_std'] == NARROW.z_std
    output = capsys.readouterr().out
    assert output.count('warning: complete collapse at step 60: loss -0.9700') == 1
    assert output.count('warning') == 1
    assert 'z_std 0.4 (0.98)' in output
    assert '1. the stop-gradient is off: --config.method.stop_gradient=True' in output
    assert 'step 30, from before it, is kept' in output


def test_held_checkpoints_outlive_keep_and_the_run(tmp_path: pathlib.Path) -> None:
    def steps_after(actions: list[int], hold: int | None = -1) -> list[int]:
        with checkpoint.open(str(tmp_path), corruptions['CONFIG'], max_to_keep=1) as checkpoints:
            if hold != -1:
                assert checkpoints.pin(hold) == (None if hold is None else 11)
            for step in actions:
                checkpoints.save(corruptions['state_at'](step))
        return sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())

    assert steps_after([11]) == [11]
    assert steps_after([22, 33], hold=12) == [11, 33]
    assert steps_after([44], hold=33) == [11, 44]  # held already: from before the first sign
    assert steps_after([55], hold=None) == [55]


@pytest.mark.parametrize(
    'name',
    [
        'no BN in the heads',
        pytest.param('identical images', marks=pytest.mark.long),
        pytest.param('rate x 30', marks=pytest.mark.long),
        pytest.param('constant views', marks=pytest.mark.long),
    ],
)
def test_a_staged_collapse_is_seen_in_the_first_fifth(name: str) -> None:
    case = guard_table.CASES[name]
    outcome = guard_table.run(case)
    assert outcome.verdict != guard.HEALTHY
    assert outcome.step <= 440
    assert case.cause in outcome.cause


@pytest.mark.parametrize(
    'name', ['simsiam, seed 0', pytest.param('moco_v2', marks=pytest.mark.long)]
)
def test_a_healthy_run_stays_quiet(name: str) -> None:
    assert guard_table.run(guard_table.CASES[name]).verdict == guard.HEALTHY


def test_a_run_stops_where_it_is_asked_to(tmp_path: pathlib.Path, capsys) -> None:
    config = load('quickstart', guard='stop', method__stop_gradient=False)
    config.model.width_multiplier = 0.125
    config.eval.train = config.eval.test = ''
    config.log.tensorboard = False
    with pytest.raises(errors.UserError, match=r'collapse at step \d+: the stop-gradient') as error:
        pretrain.run(config, str(tmp_path))
    assert '\n' not in str(error.value)
    written = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    measured = [line for line in written if 'guard/rank' in line]
    assert [line['step'] for line in measured[:4]] == [0, 10, 20, 40]
    assert measured[-1]['step'] <= 440
    assert measured[-1]['guard/rank'] < measured[0]['guard/rank']
    said = capsys.readouterr().out.partition('warning: ')[2]
    assert said.startswith((tmp_path / 'guard.txt').read_text())


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(errors.UserError, match=r"guard is 'of'.*off"):
        pretrain_setup.build(load('quickstart', guard='of'))
