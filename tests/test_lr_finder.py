"""Tests of tasks/lr_finder.py: the choice between trials, and whole searches on digits."""

import dataclasses

import pytest
from configurations import load

from simsiam_jax.tasks import lr_finder
from simsiam_jax.training import guard, monitor

BEFORE = monitor.RepresentationMetrics(
    rankme=40.0,
    z_std=1.0,
    alignment=1.8,
    uniformity=-3.6,
    dead_channels=0.0,
    loss_floor=-0.3,
    view_distance=0.8,
)


def trial(verdict: str, alignment: float, z_std: float = 1.0) -> lr_finder.Trial:
    after = dataclasses.replace(BEFORE, alignment=alignment, z_std=z_std)
    return lr_finder.Trial(verdict, -0.9, [BEFORE, after])


def test_search_picks_healthy_rate_of_smallest_view_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = {
        0.1: trial(guard.HEALTHY, 1.0),
        0.4: trial(guard.HEALTHY, 0.2),
        1.6: trial(guard.COMPLETE, 0.002, z_std=0.2),
        6.4: lr_finder.Trial(lr_finder.NOT_FINITE, -0.9, [BEFORE]),
    }
    assert trials[0.4].view_distance == pytest.approx(0.1)
    # It is relative to the images' distance: views may be close because all images are.
    assert trial(guard.HEALTHY, 0.2, z_std=0.5).view_distance == pytest.approx(0.4)

    class ShortTraining:
        def __init__(self, config):
            pass

        def __call__(self, rate: float) -> lr_finder.Trial:
            return trials[round(rate, 9)]

    monkeypatch.setattr(lr_finder, '_ShortTraining', ShortTraining)
    config = load('quickstart', optim__learning_rate=0.4)
    result = lr_finder.search(config)
    assert result.rate == 0.4
    assert 'complete collapse' in result.table
    # No rate is healthy: one lower rate is tried, and the given one is kept.
    config.optim.learning_rate = 25.6
    trials |= {25.6: trials[1.6], 102.4: trials[6.4]}
    result = lr_finder.search(config)
    assert result.rate == 25.6
    assert 'no rate that was tried is healthy' in result.reason
    assert 'not finite' in result.table


@pytest.mark.long
def test_search_rejects_rate_that_collapses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_finder, 'STEPS', 60)
    config = load('quickstart', model__width_multiplier=0.125, optim__learning_rate=24.0)
    result = lr_finder.search(config)
    assert result.rate < 24
    assert 'collapse' in result.table


@pytest.mark.long
def test_search_finds_rate_of_quickstart() -> None:
    # kNN after all 200 epochs agrees: benchmarks/GUARD.md.
    assert lr_finder.search(load('quickstart', optim__learning_rate=3.2)).rate == 0.8
