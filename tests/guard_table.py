"""Staged collapses and healthy runs on digits, and what the guard says of each.

    python tests/guard_table.py [CASE ...]

prints the table of benchmarks/GUARD.md. Collapses have the quickstart's 200 epochs, of which the
first fifth is run, at most 1000 steps, up to the step at which the guard fires; healthy runs are
whole ones of 40.
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
      change: keys that are others than in the quickstart.
      cause: words of the first cause that must be named; '': the run is healthy.
      identical: all images are the first.
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
    'identical images': Case({}, 'have a near-duplicate', identical=True),
    'constant views': Case(STILL, 'views of an image are the same'),
    'batch 8': Case({'batch_size': 8}, "BN's statistics are of 8 images"),
    'batch 2': Case({'batch_size': 2}, "BN's statistics are of 2 images"),
    **{f'simsiam, seed {seed}': Case({'seed': seed}) for seed in range(3)},
    **{method: Case(method=method) for method in ('simclr', 'moco_v2', 'byol', 'swav')},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
      verdict: HEALTHY where the guard did not fire.
      step: at which it fired, else the last one run.
      loss: of that step.
      cause: the first that is named.
    """

    verdict: str
    step: int
    loss: float
    before: RepresentationMetrics
    now: RepresentationMetrics
    cause: str


def run(case: Case) -> Outcome:
    """Trains a net half as wide as the quickstart's until the guard fires, at most to the end."""
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
    measuring = guard.Guard(
        parts.method, parts.mesh, parts.to_views, batch_size=config.batch_size, last=last
    )
    data = diagnosis.sample_dataset(source)
    state = mesh_lib.replicate(parts.init(), parts.mesh)
    history = [measuring.measure(state, parts.batches(0, measuring.batches))]
    train_step = pretrain_setup.build_step(config, parts)
    verdict = guard.HEALTHY
    steps = min(last // 5, LONGEST) if case.cause else last
    for number, batch in enumerate(parts.batches(0, steps), 1):
        state, metrics = train_step(state, batch)
        if measures := measuring.see(number, state, batch):
            history.append(measures)
            verdict = guard.diagnose(history, data.duplicates)
            if verdict != guard.HEALTHY:
                break
    found = diagnosis.causes(config, history[-1], data)
    return Outcome(verdict, number, float(metrics['loss']), history[0], history[-1], found[0].text)


def row(name: str, outcome: Outcome) -> str:
    now, before = outcome.now, outcome.before
    return (
        f'| {name} | {outcome.verdict} | {outcome.step} | {outcome.loss:.3f} '
        f'| {now.z_std:.2f} | {now.rank:.1f} of {before.rank:.1f} | {now.uniformity:.2f} '
        f'| {outcome.cause if outcome.verdict != guard.HEALTHY else ""} |'
    )


def main() -> None:
    print('| run | the guard says | at step | loss | z_std | rank | uniformity | first cause |')
    print('|---|---|---|---|---|---|---|---|')
    for name in sys.argv[1:] or CASES:
        print(row(name, run(CASES[name])), flush=True)


if __name__ == '__main__':
    main()
