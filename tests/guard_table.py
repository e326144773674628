"""Staged collapses and healthy runs on digits, and the guard's verdicts.

Prints the table of benchmarks/GUARD.md::

    PYTHONPATH=. python tests/guard_table.py [CASE ...]

A collapse has the quickstart's 200 epochs. It runs until the guard fires, for at most the first
fifth of its steps and at most 1000 steps. A healthy run has 40 epochs and runs to the end.
"""

import dataclasses
import sys
from typing import Any
from unittest import mock

import jax
from configurations import load

from simsiam_jax.data import sources
from simsiam_jax.tasks import diagnosis, pretrain_setup
from simsiam_jax.training import guard
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.monitor import RepresentationMetrics

COLLAPSED, WHOLE = 200, 40  # epochs
LONGEST = 1000  # steps of a collapse: small batches have many

STILL = {
    **{'augment.crop_scale': (1.0, 1.0), 'augment.crop_ratio': (1.0, 1.0)},
    **{'augment.rotation': 0.0, 'augment.jitter': 0.0},
}
NO_BN = {
    f'method.{key}': False
    for key in ('projector_hidden_bn', 'projector_output_bn', 'predictor_hidden_bn')
}

# Metrics before training, of healthy training and of a complete collapse.
BEFORE = RepresentationMetrics(
    rankme=40.0,
    z_std=0.98,
    alignment=1.8,
    uniformity=-3.6,
    dead_channels=0.0,
    loss_floor=-0.3,
    view_distance=0.8,
)
HEALTHY = dataclasses.replace(BEFORE, rankme=26.0, alignment=0.2, uniformity=-2.0)
NARROW = dataclasses.replace(HEALTHY, z_std=0.4, rankme=30.0, uniformity=-0.2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
      change: Keys of the quickstart's configuration to change.
      cause: Words of the most likely cause that must be reported; '' if the run is healthy.
      method: Method of the quickstart.
      identical: Replaces all images by the first one.
    """

    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    cause: str = ''
    method: str = 'simsiam'
    identical: bool = False


CASES = {
    'stop-gradient off': Case({'method.stop_gradient': False}, 'stop-gradient is off'),
    'no predictor': Case({'method.predictor': False}, 'there is no predictor'),
    'fixed predictor': Case({'optim.predictor_schedule': 'fixed'}, 'the predictor does not learn'),
    'no BN in the heads': Case(NO_BN, 'no BN in the heads'),
    'rate x 30': Case({'optim.learning_rate': 24.0}, 'the learning rate is 12'),
    'identical images': Case({}, 'are near-duplicates', identical=True),
    'constant views': Case(STILL, 'views of an image are nearly identical'),
    'batch 8': Case({'batch_size': 8}, 'BN statistics are computed over only 8 images'),
    'batch 2': Case({'batch_size': 2}, 'BN statistics are computed over only 2 images'),
    **{f'simsiam, seed {seed}': Case({'seed': seed}) for seed in range(3)},
    **{method: Case(method=method) for method in ('simclr', 'moco_v2', 'byol', 'swav')},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
      verdict: Verdict of the guard; HEALTHY if it did not fire.
      step: Step at which the guard fired, otherwise the last step.
      loss: Loss of that step.
      before: Metrics before training.
      now: Last metrics.
      cause: Most likely cause.
    """

    verdict: str
    step: int
    loss: float
    before: RepresentationMetrics
    now: RepresentationMetrics
    cause: str


def run(case: Case, steps: int | None = None) -> Outcome:
    """Trains a network half as wide as the quickstart's until the guard fires.

    Args:
      case: The run.
      steps: Last step if the guard does not fire; None runs as many as the table has.
    """
    config = load(f'quickstart:{case.method}', model__width_multiplier=0.125)
    config.epochs = COLLAPSED if case.cause else WHOLE
    config.eval.train = config.eval.test = ''
    config.update_from_flattened_dict(case.change)
    source = sources.open_source('digits/train')
    if case.identical:
        source.images[:] = source.images[0].copy()
    with mock.patch.object(sources, 'open_source', return_value=source):
        parts = pretrain_setup.build(config, mesh_lib.make_mesh(jax.devices()[:1]))
    last = config.epochs * parts.sampler.steps_per_epoch
    monitor = guard.Guard(
        parts.method, parts.mesh, parts.to_views, batch_size=config.batch_size, last=last
    )
    data = diagnosis.sample_dataset(source)
    state = mesh_lib.replicate(parts.init(), parts.mesh)
    history = [monitor.measure(state, parts.batches(0, monitor.batches))]
    train_step = pretrain_setup.build_step(config, parts)
    verdict = guard.HEALTHY
    steps = steps or (min(last // 5, LONGEST) if case.cause else last)
    for step, batch in enumerate(parts.batches(0, steps), 1):
        state, metrics = train_step(state, batch)
        result = monitor.update(step, state, batch)
        if result and (measured := result()):
            history.append(measured)
            verdict = guard.diagnose(history, data.duplicates)
            if verdict != guard.HEALTHY:
                break
    causes = diagnosis.causes(config, history[-1], data)
    return Outcome(verdict, step, float(metrics['loss']), history[0], history[-1], causes[0].text)


def row(name: str, outcome: Outcome) -> str:
    """Returns a row of the table."""
    now, before = outcome.now, outcome.before
    return (
        f'| {name} | {outcome.verdict} | {outcome.step} | {outcome.loss:.3f} '
        f'| {now.z_std:.2f} | {now.rankme:.1f} of {before.rankme:.1f} | {now.uniformity:.2f} '
        f'| {outcome.cause if outcome.verdict != guard.HEALTHY else ""} |'
    )


def main() -> None:
    print('| run | verdict | step | loss | z_std | rankme | uniformity | most likely cause |')
    print('|---|---|---|---|---|---|---|---|')
    for name in sys.argv[1:] or CASES:
        print(row(name, run(CASES[name])), flush=True)


if __name__ == '__main__':
    main()
