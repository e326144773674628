"""Throughput and remaining time of a run, shown in one live line of a terminal."""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from simsiam_jax import terminal

_INTERVAL = 0.2  # seconds between two updates of the line


class Throughput:
    """Measures images/s, waiting for data and remaining time of a run.

    Args:
      first: Step from which the run starts or resumes.
      last: Last step of the run.
      batch_size: Images per step.
    """

    def __init__(self, first: int, last: int, batch_size: int):
        self.last, self._batch_size = last, batch_size
        self._step = self._begin_step = first
        self._bar: Any = None
        self._text, self._rate, self._drawn = '', 0.0, 0.0

    @property
    def live(self) -> bool:
        """Whether a live line is shown; false outside line() and without a terminal."""
        return self._bar is not None and not self._bar.disable

    @contextlib.contextmanager
    def line(self) -> Iterator[None]:
        """Shows step, remaining time and latest metrics in a terminal, within this context."""
        with terminal.progress(
            total=self.last,
            initial=self._step,
            bar_format='{percentage:3.0f}%|{bar:10}| {desc}',
            leave=True,
            delay=0,
        ) as self._bar:
            self._draw()
            yield
            self._draw()

    def show(self, text: str) -> None:
        """Sets the text that follows step, remaining time and rate in the line."""
        self._text = text

    def _draw(self) -> None:
        if not self.live:
            return
        if self._rate:
            text = f'eta {self.eta(self._step)}  {self._rate:.0f} images/s  {self._text}'
        elif self._step > self._begin_step:
            text = 'measuring the rate'  # steps are queued faster than they are computed
        else:
            text = 'compiling the step' if self._step < self.last else 'no steps left'
        self._bar.n = self._step
        self._bar.set_description_str(f'step {self._step}/{self.last}  {text}')
        self._drawn = time.perf_counter()

    def start(self, step: int) -> None:
        """Starts the measurement at this step, after compilation."""
        self._begin_step = self._lap_step = step
        self._begin = self._lap = time.perf_counter()
        self._waited = 0.0

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches, one per step, and counts the time for each as waiting for data."""
        self._waited = 0.0
        before = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - before
            yield batch
            self._step += 1
            before = time.perf_counter()
            if before - self._drawn > _INTERVAL:
                self._draw()

    @contextlib.contextmanager
    def pause(self, state: Any) -> Iterator[None]:
        """Waits until `state` is computed, then excludes the time in this context from the rate."""
        jax.block_until_ready(state)
        before = time.perf_counter()
        yield
        self._lap += time.perf_counter() - before

    def lap(self, step: int) -> tuple[float, float]:
        """Returns images/s and the fraction of time spent waiting for data, since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        self._rate = (step - self._lap_step) * self._batch_size / seconds
        wait = min(self._waited / seconds, 1.0)
        self._lap, self._lap_step, self._waited = now, step, 0.0
        return self._rate, wait

    def eta(self, step: int) -> str:
        """Returns the remaining time, h:mm:ss, at the average pace so far with evaluations."""
        return str(datetime.timedelta(seconds=round(self._pace(step) * (self.last - step))))

    def _pace(self, step: int) -> float:
        """Returns seconds per step since the start."""
        return (time.perf_counter() - self._begin) / max(step - self._begin_step, 1)
