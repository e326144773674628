"""The callback that logs the guard's metrics and warns about a collapse and its likely causes."""

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


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A measurement whose metrics are not yet read.

    Attributes:
      step: Step of the measurement.
      result: Waits for the metrics.
      metrics: Metrics of the step, on the devices.
    """

    step: int
    result: guard.Result
    metrics: dict[str, jax.Array]


class CollapseCallback:
    """Detects a collapse. Call on_train_begin() before the first step, the object after each step.

    Args:
      config: Configuration of the run; `guard` is 'warn' or 'stop'.
      monitor: The guard that measures the representation.
      source: Training images.
      checkpoints: Checkpoints of the run; the last healthy one is pinned.
      log: Log of the run.
    """

    def __init__(
        self,
        config: ConfigDict,
        monitor: guard.Guard,
        source: ImageSet,
        checkpoints: Checkpoints,
        log: writers.MetricWriter,
    ):
        self._config, self._guard = config, monitor
        self._checkpoints, self._log = checkpoints, log
        self._dataset = diagnosis.sample_dataset(source)
        self._history: list[RepresentationMetrics] = []
        self._pending: _Pending | None = None
        self._start = 0  # step that this process started from
        self._healthy = 0  # last step with a healthy measurement
        self._pinned: int | None = None
        self._warnings: dict[str, str] = {}  # verdict -> warning that was printed

    def on_train_begin(self, initial: TrainState, batches: Iterable[Any], step: int) -> None:
        """Measures the network before training; a resumed run keeps its first measurement.

        Args:
          initial: State before training, also if the run resumes. It is measured if the log of a
            resumed run has no measurement.
          batches: Batches of the measurement.
          step: Step that the run starts or resumes from.

        Raises:
          UserError: The outputs of the network are not finite.
        """
        measured = self._kept() if step else None
        measured = measured or self._guard.measure(initial, batches)
        if measured is None:
            raise errors.UserError(
                'the outputs of the network are not finite before training; check the images '
                'and augment.std, or disable the guard: --config.guard=off'
            )
        self._history = [measured]
        self._start = self._healthy = step
        if step == 0:
            self._write(0, measured)

    def __call__(
        self, step: int, state: TrainState, batch: Any, metrics: dict[str, jax.Array]
    ) -> None:
        """Measures the network if due; warns if it has collapsed.

        The metrics are ready some steps after the measurement, so that the training need not wait.

        Args:
          step: Step that ended.
          state: State after the step.
          batch: Batch of the step.
          metrics: Metrics of the step.

        Raises:
          UserError: The network has collapsed, and config.guard is 'stop'.
        """
        result = self._guard.update(step, state, batch)
        if self._pending and (result or step >= self._guard.ready(self._pending.step)):
            self._judge()
        if result:
            self._pending = _Pending(step, result, metrics)
            if self._guard.ready(step) <= step:
                self._judge()

    def _judge(self) -> None:
        """Logs the pending measurement and warns if it shows a collapse."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        step, measured = pending.step, pending.result()
        if measured is None:
            return
        self._history.append(measured)
        self._write(step, measured)
        self._pin(step, guard.classify(self._history) == guard.HEALTHY)
        verdict = guard.diagnose(self._history, self._dataset.duplicates)
        if verdict == guard.HEALTHY or verdict in self._warnings:
            return
        causes = diagnosis.causes(self._config, measured, self._dataset)
        text = distributed.broadcast_from_process_0(
            self._text(verdict, step, float(pending.metrics['loss']), causes)
        )
        say(f'warning: {text}')
        self._warnings[verdict] = text
        self._log.text('guard.txt', '\n\n'.join(self._warnings.values()))
        if self._config.guard == 'stop':
            raise errors.UserError(
                f'{verdict} at step {step}: {causes[0].text}. Try {causes[0].remedy}, or set '
                '--config.guard=warn to continue'
            )

    @property
    def first_and_last(self) -> tuple[RepresentationMetrics, RepresentationMetrics] | None:
        """The measurements before training and the latest since this start; None without one."""
        return (self._history[0], self._history[-1]) if len(self._history) > 1 else None

    def _kept(self) -> RepresentationMetrics | None:
        """Returns the measurement before training from the log; None if it has none."""
        values = distributed.broadcast_from_process_0(self._log.before_training('guard'))
        names = {field.name for field in dataclasses.fields(RepresentationMetrics)}
        return RepresentationMetrics(**values) if values.keys() == names else None

    def _write(self, step: int, measured: RepresentationMetrics) -> None:
        values = dataclasses.asdict(measured)
        self._log.scalars(step, {f'guard/{name}': value for name, value in values.items()})

    def _pin(self, step: int, healthy: bool) -> None:
        """Pins the last healthy checkpoint at the first sign of a collapse.

        The pin is removed if the sign disappears before a warning.
        """
        if healthy:
            # A checkpoint that an earlier start of the run pinned stays pinned.
            if self._pinned is not None and self._pinned >= self._start and not self._warnings:
                self._checkpoints.pin(None)
            self._healthy, self._pinned = step, None
        elif self._pinned is None:
            self._pinned = self._checkpoints.pin(self._healthy)

    def _text(self, verdict: str, step: int, loss: float, causes: list[diagnosis.Diagnosis]) -> str:
        now, before = self._history[-1], self._history[0]
        values = ', '.join(
            f'{name} {getattr(now, name):.3g} ({getattr(before, name):.3g})'
            for name in ('z_std', 'rankme', 'alignment', 'uniformity', 'view_distance')
        )
        pinned = (
            f'checkpoint {self._pinned}, from before the collapse, is kept'
            if self._pinned is not None
            else 'there is no checkpoint from before the collapse'
        )
        return '\n'.join(
            [
                f'{verdict} at step {step}: loss {loss:.4f}, {values}; '
                'values before training in parentheses',
                '  possible causes and fixes, most likely first:',
                *(f'  {i}. {cause.text}: {cause.remedy}' for i, cause in enumerate(causes, 1)),
                f'  {pinned}',
            ]
        )
