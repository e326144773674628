"""Tests of training/monitor.py and training/guard.py: metrics, verdicts, staged collapses."""

import dataclasses
import json
import math
import pathlib

import guard_table
import jax
import numpy as np
import pytest
from configurations import load
from guard_table import BEFORE, HEALTHY, NARROW
from jax.sharding import PartitionSpec as P

from simsiam_jax import errors
from simsiam_jax.models.network import Outputs
from simsiam_jax.pages import runs
from simsiam_jax.tasks import pretrain, pretrain_setup
from simsiam_jax.training import guard, monitor
from simsiam_jax.training import mesh as mesh_lib


def test_moments_over_8_devices_match_numpy() -> None:
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((16, 2, 2, 1)).astype(np.float32) for _ in range(2)]
    features = [rng.standard_normal((16, 6)).astype(np.float32) for _ in range(2)]
    for feature in features:
        feature[:, 0], feature[:, 1] = 3.0, 0.0  # two dead channels
        feature[:, 2] = feature[:, 3]
    z = [rng.standard_normal((16, 5)).astype(np.float32) + 1 for _ in range(2)]

    def moments(views, features, z):
        outputs = [Outputs(feature=f, z=x, p=None) for f, x in zip(features, z, strict=True)]
        return monitor.moments(views, outputs, mesh_lib.DATA)

    mesh = mesh_lib.make_mesh()
    spread = jax.shard_map(moments, mesh=mesh, in_specs=P(mesh_lib.DATA), out_specs=P())
    measured = monitor.summary(jax.device_get(jax.jit(spread)(views, features, z)))

    both = np.concatenate(features).astype(np.float64)
    share = np.linalg.svd(both, compute_uv=False)[:5] / np.linalg.svd(both, compute_uv=False).sum()
    assert measured.rankme == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert measured.dead_channels == pytest.approx(2 / 6)
    z1, z2 = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in z)
    assert measured.alignment == pytest.approx(np.mean(np.sum((z1 - z2) ** 2, 1)), rel=1e-5)
    cosine = np.mean(np.sum(z1 * z2, 1))
    assert measured.loss_floor == pytest.approx(-np.sqrt(cosine), rel=1e-5)
    squares = [np.sum((z1[i] - z1[j]) ** 2) for i in range(16) for j in range(16) if i != j]
    assert measured.uniformity == pytest.approx(
        np.log(np.mean(np.exp(-2 * np.array(squares)))), 1e-5
    )
    v1, v2 = (view.reshape(16, -1) for view in views)
    ratio = np.mean((v1 - v2) ** 2) / (2 * np.mean(v1.var(0)))
    assert measured.view_distance == pytest.approx(math.sqrt(ratio), rel=1e-5)


def test_effective_rank_ignores_float32_rounding() -> None:
    assert monitor.effective_rank(np.eye(7)) == pytest.approx(7)
    # The rounding of float32 in empty directions does not count.
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
        (dataclasses.replace(HEALTHY, rankme=15.0), guard.PARTIAL),
        (dataclasses.replace(HEALTHY, uniformity=-0.8), guard.PARTIAL),
        (dataclasses.replace(HEALTHY, view_distance=0.05), guard.TRIVIAL),
    ],
)
def test_diagnose_needs_three_consecutive_signs(
    now: monitor.RepresentationMetrics, verdict: str
) -> None:
    assert guard.diagnose([BEFORE, now, now, now]) == verdict
    assert guard.diagnose([BEFORE, now, now]) == guard.HEALTHY
    assert guard.diagnose([BEFORE, now, HEALTHY, now, now]) == guard.HEALTHY
    assert guard.diagnose([BEFORE, *[HEALTHY] * 9, now, now, now]) == verdict


def test_diagnose_ignores_embeddings_that_spread_again() -> None:
    # z_std of MoCo v2 on digits, which has no BN in its head.
    recovery = [0.44, 0.12, 0.14, 0.36, 0.57, 0.65]
    history = [dataclasses.replace(NARROW, z_std=z_std) for z_std in recovery]
    for end in range(1, len(history) + 1):
        assert guard.diagnose(history[:end]) == guard.HEALTHY
    assert guard.diagnose([*history[:3], *history[1:3], history[2]]) == guard.COMPLETE


def test_guard_measures_early_then_rarely() -> None:
    config = load('quickstart')
    parts = pretrain_setup.build(config, mesh_lib.make_mesh(jax.devices()[:1]))
    for batch_size, last, first in ((128, 2200, [10, 20, 40, 50, 100]), (16, 800, [40, 80, 160])):
        monitored = guard.Guard(
            parts.method, parts.mesh, parts.to_views, batch_size=batch_size, last=last
        )
        due = [step for step in range(last + 1) if monitored.due(step)]
        assert due[: len(first)] == first
        assert len(due) * monitored.batches / 3 < 0.02 * last


@pytest.mark.parametrize(
    'name',
    [
        'no BN in the heads',
        pytest.param('identical images', marks=pytest.mark.long),
        pytest.param('rate x 30', marks=pytest.mark.long),
        pytest.param('constant views', marks=pytest.mark.long),
    ],
)
def test_guard_detects_staged_collapse_in_first_fifth(name: str) -> None:
    case = guard_table.CASES[name]
    outcome = guard_table.run(case)
    assert outcome.verdict != guard.HEALTHY
    assert outcome.step <= 440
    assert case.cause in outcome.cause


@pytest.mark.parametrize(
    ('name', 'steps'),
    [
        ('simsiam, seed 0', 150),  # RankMe is lowest at step 50, uniformity highest at 100
        pytest.param('simsiam, seed 0', None, marks=pytest.mark.long),
        pytest.param('moco_v2', None, marks=pytest.mark.long),
    ],
)
def test_guard_stays_quiet_in_healthy_run(name: str, steps: int | None) -> None:
    assert guard_table.run(guard_table.CASES[name], steps).verdict == guard.HEALTHY


def test_run_with_guard_stop_exits_at_collapse(tmp_path: pathlib.Path, capsys) -> None:
    config = load('quickstart', guard='stop', method__stop_gradient=False)
    config.model.update(width_multiplier=0.125, stages=(1, 1))
    config.eval.train = config.eval.test = ''
    config.log.tensorboard = False
    with pytest.raises(errors.UserError, match=r'collapse at step \d+: the stop-gradient') as error:
        pretrain.run(config, str(tmp_path))
    assert '\n' not in str(error.value)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    measured = [line for line in lines if 'guard/rankme' in line]
    assert [line['step'] for line in measured[:4]] == [0, 10, 20, 40]
    assert measured[-1]['step'] <= 440
    assert measured[-1]['guard/rankme'] < measured[0]['guard/rankme']
    warning = capsys.readouterr().out.partition('warning: ')[2]
    assert warning.startswith((tmp_path / 'guard.txt').read_text())


def test_build_rejects_unknown_guard_choice() -> None:
    with pytest.raises(errors.UserError, match=r"guard is 'of'.*off"):
        pretrain_setup.build(load('quickstart', guard='of'))


def test_read_curves_renames_metrics_of_earlier_versions(tmp_path: pathlib.Path) -> None:
    lines = [{'step': 10, 'guard/rank': 22.0}, {'step': 20, 'guard/rankme': 20.0}]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert runs.read_curves(tmp_path) == {'guard/rankme': [(10, 22.0), (20, 20.0)]}
