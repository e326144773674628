"""How fast a run goes, when it ends, and the line of a terminal that says so."""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from simsiam_jax import terminal

_INTERVAL = 0.2  # seconds between two drawings of the line


class Throughput:
    """Rates and time left of a run from step `first` to `last`.

    Attributes:
      live: whether a line of the terminal keeps up with the steps; only within line().
    """

    def __init__(self, first: int, last: int, batch_size: int):
        self.last, self._batch_size = last, batch_size
        self._step = self._begin_step = first
        self._bar: Any = None
        self._shown, self._rate, self._drawn = '', 0.0, 0.0

    @property
    def live(self) -> bool:
        return self._bar is not None and not self._bar.disable

    @contextlib.contextmanager
    def line(self) -> Iterator[None]:
        """Within it a terminal shows the step, the time left and what was measured last."""
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
        """What the line says beside step, time left and rate."""
        self._shown = text

    def _draw(self) -> None:
        if not self.live:
            return
        if self._step > self._begin_step:
            rate = self._rate or self._batch_size / self._pace(self._step)
            text = f'left {self.left(self._step)}  {rate:.0f} images/s  {self._shown}'
        else:
            text = 'the step is being compiled' if self._step < self.last else 'nothing is left'
        self._bar.n = self._step
        self._bar.set_description_str(f'step {self._step}/{self.last}  {text}')
        self._drawn = time.perf_counter()

    def start(self, step: int) -> None:
        """Counts from here: what came before was compilation."""
        self._begin_step = self._lap_step = step
        self._begin = self._lap = time.perf_counter()
        self._waited = 0.0

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, one a step; the time until each comes counts as waiting for data."""
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
        """What happens within, once `state` is computed, does not count in the rate."""
        jax.block_until_ready(state)
        before = time.perf_counter()
        yield
        self._lap += time.perf_counter() - before

    def lap(self, step: int) -> tuple[float, float]:
        """(images a second, share of the time spent waiting for data) since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        self._rate = (step - self._lap_step) * self._batch_size / seconds
        wait = min(self._waited / seconds, 1.0)
        self._lap, self._lap_step, self._waited = now, step, 0.0
        return self._rate, wait

    def left(self, step: int) -> str:
        """Time left, h:mm:ss, at the pace of the run so far, evaluations included."""
        return str(datetime.timedelta(seconds=round(self._pace(step) * (self.last - step))))

    def _pace(self, step: int) -> float:
        """Seconds a step since the start."""
        return (time.perf_counter() - self._begin) / max(step - self._begin_step, 1)
