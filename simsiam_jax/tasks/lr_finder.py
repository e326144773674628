"""Looks for a learning rate by short trainings, judged without labels."""

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

# Of the configuration's base rate; then one more beyond the best, where that is an outer one
# (or below all, where none is healthy).
FACTORS = (1 / 4, 1, 4)

STEPS = 300

NOT_FINITE = 'not finite'


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
      rate: the base rate, for config.optim.learning_rate.
      reason: why this rate, in a line.
      table: what was seen at every rate, in several.
    """

    rate: float
    reason: str
    table: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """How a short training went.

    Attributes:
      verdict: what the guard says at its end, or NOT_FINITE.
      loss: the last one.
      measures: before training and from time to time.
    """

    verdict: str
    loss: float
    measures: Sequence[RepresentationMetrics]

    @property
    def distance(self) -> float:
        """Squared, of an image's two z, as a share of that of different images' z.

        About 1 for a random network, and for one whose z is the same for all images; towards 0 as
        images are told apart whatever their augmentation. A mean of the second half, for a single
        measurement varies as much as rates differ.
        """
        late = self.measures[len(self.measures) // 2 :]
        return statistics.fmean(m.alignment / max(2 * m.z_std**2, 1e-12) for m in late)


def search(config: ConfigDict) -> SearchResult:
    """Takes the first STEPS steps of the training at three or four base rates, without warm-up.

    Not a short training with all its cosine: rates do well in that which the whole one, staying
    near them for long, does not bear. The rate is taken at which an image's views come nearest to
    each other beside other images', of those at which the guard sees no collapse.

    Raises:
      UserError: the configuration or the data cannot be used.
    """
    config = config.copy_and_resolve_references()
    config.eval.train = config.eval.test = ''
    base = config.optim.learning_rate
    short = _Short(config)
    tries = {base * factor: short(base * factor) for factor in FACTORS}
    best = _best(tries)
    if best is None or best == min(tries):
        further = min(tries) / 4
        tries[further] = short(further)
    elif best == max(tries):
        further = max(tries) * 4
        tries[further] = short(further)
    best = _best(tries)
    rows = [
        'base rate  the guard says       loss     rank            views',
        *(_row(rate, tries[rate]) for rate in sorted(tries)),
        'views: distance of the two views of an image, as a share of that of different images',
    ]
    if best is None:
        reason = 'none of the rates tried is healthy, so this one stays: look for another cause'
    else:
        reason = 'of the rates tried the healthy one at which the views of an image come nearest'
    return SearchResult(base if best is None else best, reason, '\n'.join(rows))


def _best(tries: dict[float, Trial]) -> float | None:
    healthy = [rate for rate, seen in tries.items() if seen.verdict == guard.HEALTHY]
    return min(healthy, key=lambda rate: tries[rate].distance, default=None)


def _row(rate: float, seen: Trial) -> str:
    if seen.verdict == NOT_FINITE:
        return f'{rate:<9.4g}  {seen.verdict}'
    rank = f'{seen.measures[-1].rank:.1f} of {seen.measures[0].rank:.1f}'
    return f'{rate:<9.4g}  {seen.verdict:<18} {seen.loss:7.4f}  {rank:<14}  {seen.distance:.3f}'


class _Short:
    """The first steps of a configuration at any base rate, compiled once."""

    def __init__(self, config: ConfigDict):
        parts = pretrain_setup.build(config)
        self._parts = parts
        whole = config.epochs * parts.sampler.steps_per_epoch
        self._steps = min(STEPS, whole)
        given = config.optim.to_dict()
        accumulate = given.pop('gradient_accumulation_steps')
        # A part of the state and not of the program: one program serves all rates.
        tx = optax.inject_hyperparams(
            lambda learning_rate: optim.make(
                **given | {'learning_rate': learning_rate, 'warmup_epochs': 0, 'by_epoch': False},
                batch_size=config.batch_size,
                epochs=config.epochs,
                steps_per_epoch=parts.sampler.steps_per_epoch,
            )[0]
        )(learning_rate=config.optim.learning_rate)
        shape = (parts.recipes[0].size, parts.recipes[0].size, config.data.channels)
        self._initial = step.init_state(parts.method, tx, config.seed, shape)
        if config.init_from:
            self._initial, _ = weights.load_into_state(
                self._initial, weights.open_weights(config.init_from)
            )
        self._train_step = step.make_train_step(
            parts.method, tx, parts.mesh, parts.to_views, whole, accumulation_steps=accumulate
        )
        self._guard = guard.Guard(
            parts.method,
            parts.mesh,
            parts.to_views,
            batch_size=config.batch_size,
            last=self._steps,
        )
        self._duplicates = diagnosis.sample_dataset(parts.source).duplicates

    def __call__(self, rate: float) -> Trial:
        self._initial.opt_state.hyperparams['learning_rate'] = jnp.float32(rate)
        state = mesh_lib.replicate(self._initial, self._parts.mesh)
        before = self._measure(state)
        if before is None:
            raise errors.UserError('the network gives values that are not finite before training')
        history = [before]
        batches = self._parts.batches(0, self._steps)
        shown = terminal.progress(batches, f'base rate {rate:g}', total=self._steps, unit=' steps')
        for number, batch in enumerate(shown, 1):
            state, metrics = self._train_step(state, batch)
            if measures := self._guard.see(number, state, batch):
                history.append(measures)
                verdict = guard.diagnose(history, self._duplicates)
                if verdict != guard.HEALTHY:
                    return Trial(verdict, float(metrics['loss']), history)
            elif self._guard.due(number):  # not finite
                break
        if (now := self._measure(state)) is None:
            return Trial(NOT_FINITE, float(metrics['loss']), history)
        history.append(now)
        return Trial(guard.classify(history), float(metrics['loss']), history)

    def _measure(self, state: TrainState) -> RepresentationMetrics | None:
        return self._guard.measure(state, self._parts.batches(0, self._guard.batches))
