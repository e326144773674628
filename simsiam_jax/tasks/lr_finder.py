"""Finds a learning rate by short trainings, which are compared without labels."""

import dataclasses
import statistics
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from simsiam_jax import errors, terminal
from simsiam_jax.checkpoints import weights
from simsiam_jax.tasks import diagnosis, pretrain_setup
from simsiam_jax.training import guard, optim, step
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.monitor import RepresentationMetrics
from simsiam_jax.training.step import TrainState

# Trials, as factors of the configured base rate. One more trial follows beyond the best rate if
# that is the lowest or the highest, and below all rates if none is healthy.
FACTORS = (1 / 4, 1, 4)

STEPS = 300

NOT_FINITE = 'not finite'


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
      rate: Best base rate, for config.optim.learning_rate.
      reason: Why this rate was chosen, in one line.
      table: Outcome of each trial, in several lines.
    """

    rate: float
    reason: str
    table: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """Outcome of a short training.

    Attributes:
      verdict: Verdict of the guard at the end, or NOT_FINITE.
      loss: Last loss.
      metrics: Measurements in order, the first before training.
    """

    verdict: str
    loss: float
    metrics: Sequence[RepresentationMetrics]

    @property
    def view_distance(self) -> float:
        """Squared distance of an image's two z, relative to that of different images' z.

        About 1 for a random network, and for a network whose z is the same for all images. It
        approaches 0 as images are distinguished whatever their augmentation. It is the mean over
        the second half, since a single measurement varies as much as rates differ.
        """
        late = self.metrics[len(self.metrics) // 2 :]
        return statistics.fmean(m.alignment / max(2 * m.z_std**2, 1e-12) for m in late)


def search(config: ConfigDict) -> SearchResult:
    """Trains STEPS steps at three or four base rates without warm-up, and picks the best rate.

    The best rate has the smallest view distance of those at which the guard sees no collapse.
    Trials are the first steps of the whole schedule. A short training with a whole cosine would
    favor rates that are too high for the long one, which stays near them much longer.

    Raises:
      UserError: The configuration or the data cannot be used.
    """
    config = config.copy_and_resolve_references()
    config.eval.update(train='', test='', split=0.0)
    base = config.optim.learning_rate
    run_trial = _ShortTraining(config)
    trials = {base * factor: run_trial(base * factor) for factor in FACTORS}
    best = _best(trials)
    if best is None or best == min(trials):
        further = min(trials) / 4
        trials[further] = run_trial(further)
    elif best == max(trials):
        further = max(trials) * 4
        trials[further] = run_trial(further)
    best = _best(trials)
    rows = [
        'base rate  verdict              loss  RankMe          view distance',
        *(_row(rate, trials[rate]) for rate in sorted(trials)),
        'view distance: between the two views of an image, relative to different images',
    ]
    if best is None:
        reason = 'no rate that was tried is healthy, so the rate is kept: look for another cause'
    else:
        reason = 'smallest view distance of the healthy rates that were tried'
    return SearchResult(base if best is None else best, reason, '\n'.join(rows))


def _best(trials: dict[float, Trial]) -> float | None:
    healthy = [rate for rate, trial in trials.items() if trial.verdict == guard.HEALTHY]
    return min(healthy, key=lambda rate: trials[rate].view_distance, default=None)


def _row(rate: float, trial: Trial) -> str:
    if trial.verdict == NOT_FINITE:
        return f'{rate:<9.4g}  {trial.verdict}'
    rankme = f'{trial.metrics[-1].rankme:.1f} of {trial.metrics[0].rankme:.1f}'
    return (
        f'{rate:<9.4g}  {trial.verdict:<18} {trial.loss:7.4f}  {rankme:<14}  '
        f'{trial.view_distance:.3f}'
    )


class _ShortTraining:
    """Trains the first steps of a configuration at any base rate, and compiles them once."""

    def __init__(self, config: ConfigDict):
        setup = pretrain_setup.build(config)
        self._setup = setup
        total_steps = config.epochs * setup.sampler.steps_per_epoch
        self._steps = min(STEPS, total_steps)
        given = config.optim.to_dict()
        accumulation_steps = given.pop('gradient_accumulation_steps')
        # As part of the state, not of the program, the rate can change without recompiling.
        tx = optax.inject_hyperparams(
            lambda learning_rate: optim.make(
                **given | {'learning_rate': learning_rate, 'warmup_epochs': 0, 'by_epoch': False},
                batch_size=config.batch_size,
                epochs=config.epochs,
                steps_per_epoch=setup.sampler.steps_per_epoch,
            )[0]
        )(learning_rate=config.optim.learning_rate)
        shape = (setup.recipes[0].size, setup.recipes[0].size, config.data.channels)
        self._initial = step.init_state(setup.method, tx, config.seed, shape)
        if config.init_from:
            self._initial, _ = weights.load_into_state(
                self._initial, weights.open_weights(config.init_from)
            )
        self._train_step = step.make_train_step(
            setup.method,
            tx,
            setup.mesh,
            setup.to_views,
            total_steps,
            accumulation_steps=accumulation_steps,
            merge_views=config.merge_views,
        )
        self._guard = guard.Guard(
            setup.method,
            setup.mesh,
            setup.to_views,
            batch_size=config.batch_size,
            last=self._steps,
        )
        self._duplicates = diagnosis.sample_dataset(setup.source).duplicates

    def __call__(self, rate: float) -> Trial:
        self._initial.opt_state.hyperparams['learning_rate'] = jnp.float32(rate)
        state = mesh_lib.replicate(self._initial, self._setup.mesh)
        before = self._measure(state)
        if before is None:
            raise errors.UserError(
                'the outputs of the network are not finite before training. Check the images, '
                'augment.std and init_from'
            )
        history = [before]
        batches = self._setup.batches(0, self._steps)
        bar = terminal.progress(batches, f'base rate {rate:g}', total=self._steps, unit=' steps')
        for number, batch in enumerate(bar, 1):
            state, train_metrics = self._train_step(state, batch)
            result = self._guard.update(number, state, batch)
            if result and (metrics := result()):
                history.append(metrics)
                verdict = guard.diagnose(history, self._duplicates)
                if verdict != guard.HEALTHY:
                    return Trial(verdict, float(train_metrics['loss']), history)
            elif self._guard.due(number):  # not finite
                break
        loss = float(train_metrics['loss'])
        if (after := self._measure(state)) is None:
            return Trial(NOT_FINITE, loss, history)
        history.append(after)
        return Trial(guard.classify(history), loss, history)

    def _measure(self, state: TrainState) -> RepresentationMetrics | None:
        return self._guard.measure(state, self._setup.batches(0, self._guard.batches))
