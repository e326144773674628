"""The search for a learning rate, without labels."""

import dataclasses

import pytest
from configurations import load

from simsiam_jax.tasks import lr_finder
from simsiam_jax.training import guard, monitor

BEFORE = monitor.RepresentationMetrics(
    rank=40.0,
    z_std=1.0,
    alignment=1.8,
    uniformity=-3.6,
    dead_channels=0.0,
    loss_floor=-0.3,
    view_distance=0.8,
)


def seen(verdict: str, alignment: float, z_std: float = 1.0) -> lr_finder.Trial:
    now = dataclasses.replace(BEFORE, alignment=alignment, z_std=z_std)
    return lr_finder.Trial(verdict, -0.9, [BEFORE, now])


def test_the_best_is_healthy_and_tells_images_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = {
        0.1: seen(guard.HEALTHY, 1.0),
        0.4: seen(guard.HEALTHY, 0.2),
        1.6: seen(guard.COMPLETE, 0.002, z_std=0.2),
        6.4: lr_finder.Trial(lr_finder.NOT_FINITE, -0.9, [BEFORE]),
    }
    assert tries[0.4].distance == pytest.approx(0.1)
    # The images' own distance counts: views may be near because all images are.
    assert seen(guard.HEALTHY, 0.2, z_std=0.5).distance == pytest.approx(0.4)

    class Short:
        def __init__(self, config):
            pass

        def __call__(self, rate: float) -> lr_finder.Trial:
            return tries[round(rate, 9)]

    monkeypatch.setattr(lr_finder, '_Short', Short)
    config = load('quickstart', optim__learning_rate=0.4)
    found = lr_finder.search(config)
    assert found.rate == 0.4
    assert 'complete collapse' in found.table
    # None is healthy beyond: the rates go down once, and the given one stays.
    config.optim.learning_rate = 25.6
    tries |= {25.6: tries[1.6], 102.4: tries[6.4]}
    found = lr_finder.search(config)
    assert found.rate == 25.6
    assert 'none of the rates tried is healthy' in found.reason
    assert 'not finite' in found.table


@pytest.mark.long
def test_a_rate_far_too_high_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_finder, 'STEPS', 60)
    config = load('quickstart', model__width_multiplier=0.125, optim__learning_rate=24.0)
    found = lr_finder.search(config)
    assert found.rate < 24
    assert 'collapse' in found.table


@pytest.mark.long
def test_the_quickstarts_rate_is_found() -> None:
    # Of its 200 epochs kNN says the same: benchmarks/GUARD.md.
    assert lr_finder.search(load('quickstart', optim__learning_rate=3.2)).rate == 0.8
