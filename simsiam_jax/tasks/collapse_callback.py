"""The guard of a run: its measures go into the log, a collapse is told with its causes."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints.checkpoint import Checkpoints
from simsiam_jax.logs import writers
from simsiam_jax.runtime import distributed
from simsiam_jax.tasks import diagnosis
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import guard
from simsiam_jax.training.monitor import RepresentationMetrics
from simsiam_jax.training.step import TrainState

CHOICES = ('warn', 'stop', 'off')


class CollapseCallback:
    """Called after every step of a run, begin() before the first.

    Args:
      config: of the run; its `guard` says what follows a collapse, a warning or the end.
    """

    def __init__(
        self,
        config: ConfigDict,
        measuring: guard.Guard,
        source: ImageSet,
        checkpoints: Checkpoints,
        log: writers.MetricWriter,
    ):
        self._config, self._guard = config, measuring
        self._checkpoints, self._log = checkpoints, log
        self._data = diagnosis.sample_dataset(source)
        self._history: list[RepresentationMetrics] = []
        self._start = self._healthy = 0  # the last step that looked healthy
        self._pinned: int | None = None
        self._told: dict[str, str] = {}  # verdict -> what was said

    def begin(self, initial: TrainState, batches: Iterable[Any], step: int) -> None:
        """Measures the network before training, also where the run goes on from `step`.

        Raises:
          UserError: what the network gives is not finite.
        """
        measures = self._guard.measure(initial, batches)
        if measures is None:
            raise errors.UserError(
                'the network gives values that are not finite before training; look at the images '
                'and augment.std, or turn the guard off: --config.guard=off'
            )
        self._history = [measures]
        self._start = self._healthy = step
        if step == 0:
            self._write(0, measures)

    def __call__(
        self, number: int, state: TrainState, batch: Any, metrics: dict[str, jax.Array]
    ) -> None:
        """After step `number`.

        Raises:
          UserError: it has collapsed, and config.guard is 'stop'.
        """
        measures = self._guard.see(number, state, batch)
        if measures is None:
            return
        self._history.append(measures)
        self._write(number, measures)
        self._pin(number, guard.classify(self._history) == guard.HEALTHY)
        verdict = guard.diagnose(self._history, self._data.duplicates)
        if verdict == guard.HEALTHY or verdict in self._told:
            return
        found = diagnosis.causes(self._config, measures, self._data)
        text = distributed.broadcast_from_process_0(
            self._text(verdict, number, float(metrics['loss']), found)
        )
        say(f'warning: {text}')
        self._told[verdict] = text
        self._log.text('guard.txt', '\n\n'.join(self._told.values()))
        if self._config.guard == 'stop':
            raise errors.UserError(
                f'{verdict} at step {number}: {found[0].text}; try {found[0].remedy}, or '
                '--config.guard=warn to go on'
            )

    def _write(self, number: int, measures: RepresentationMetrics) -> None:
        values = dataclasses.asdict(measures)
        self._log.scalars(number, {f'guard/{name}': value for name, value in values.items()})

    def _pin(self, number: int, healthy: bool) -> None:
        """From the first sign on, what was saved before it stays, unless the sign passes."""
        if healthy:
            # What an earlier part of the run has held is not let go.
            if self._pinned is not None and self._pinned >= self._start and not self._told:
                self._checkpoints.pin(None)
            self._healthy, self._pinned = number, None
        elif self._pinned is None:
            self._pinned = self._checkpoints.pin(self._healthy)

    def _text(
        self, verdict: str, number: int, loss: float, found: list[diagnosis.Diagnosis]
    ) -> str:
        now, before = self._history[-1], self._history[0]
        figures = ', '.join(
            f'{name} {getattr(now, name):.3g} ({getattr(before, name):.3g})'
            for name in ('z_std', 'rank', 'alignment', 'uniformity', 'view_distance')
        )
        kept = (
            f'step {self._pinned}, from before it, is kept'
            if self._pinned is not None
            else 'no checkpoint is from before it'
        )
        return '\n'.join(
            [
                f'{verdict} at step {number}: loss {loss:.4f}; with their values before '
                f'training in brackets: {figures}',
                '  what may be the cause, and what to try, in this order:',
                *(f'  {i}. {cause.text}: {cause.remedy}' for i, cause in enumerate(found, 1)),
                f'  {kept}',
            ]
        )
