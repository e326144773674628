"""Where measurements go: the terminal, metrics.jsonl, TensorBoard, other loggers."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from simsiam_jax import errors, lazy_tf
from simsiam_jax.logs import loggers as loggers_lib
from simsiam_jax.logs.progress import Throughput
from simsiam_jax.runtime import storage, versions
from simsiam_jax.terminal import say

# What the lines of progress show, where it is measured.
_SHOWN = {'loss': '.4f', 'z_std': '.3f', 'top1': '.3f', 'lr': '.4g'}


def open_log(workdir: str, config: dict[str, Any], step: int) -> 'MetricWriter':
    """The writers that config['log'] asks for, of a run that goes on from this step.

    Raises:
      UserError: the package of a logger that is asked for is not installed.
    """
    log = config['log']
    return MetricWriter(
        workdir,
        tensorboard=log['tensorboard'],
        step=step,
        loggers=loggers_lib.start(workdir, config, wandb=log['wandb'], mlflow=log['mlflow']),
    )


class MetricWriter:
    """Measurements into metrics.jsonl and TensorBoard's events, progress to the terminal.

    Every process may call it; only the first one writes. A context manager, which closes it.

    Args:
      workdir: of the run; exists.
      tensorboard: whether to write events; needs clu and TensorFlow.
      step: the run goes on from here; lines of later steps are dropped.
      loggers: get the same points.
    """

    def __init__(
        self,
        workdir: str,
        *,
        tensorboard: bool,
        step: int,
        loggers: Sequence[loggers_lib.AsyncLogger] = (),
    ):
        self.workdir, self._start, self._loggers = workdir, step, loggers
        self._folder = storage.folder(workdir)
        self._events: Any = None
        self._bad, self._told = 0, False
        self._first = jax.process_index() == 0
        if not self._first:
            return
        path = self._folder / 'metrics.jsonl'
        kept = path.read_text().splitlines() if path.exists() else []
        self._lines = [line for line in kept if _is_up_to(line, step)]
        # By way of another file: a kill at the wrong moment must not take the old lines along.
        partial = self._folder / 'metrics.jsonl.partial'
        partial.write_text(''.join(line + '\n' for line in self._lines))
        partial.replace(path)
        if tensorboard:
            try:
                lazy_tf.load()
                from clu import metric_writers
            except (errors.UserError, ModuleNotFoundError) as error:
                say(f'no TensorBoard: {error}')
            else:
                self._events = metric_writers.SummaryWriter(workdir)

    def start(self, images: int, steps_per_epoch: int) -> None:
        """Says where everything goes and how to watch it.

        A line of starts.jsonl keeps when and on what the run was started, each time.
        """
        if self._first:
            begun = {'time': round(time.time(), 3), 'step': self._start, 'images': images}
            path = self._folder / 'starts.jsonl'
            line = begun | {'steps_per_epoch': steps_per_epoch} | versions.describe_process()
            with self._tolerate_io_errors():
                before = path.read_text() if path.exists() else ''
                path.write_text(before + json.dumps(line) + '\n')
        watch = 'tensorboard --logdir' if self._events else 'python -m simsiam_jax.tools.report'
        say(f'everything goes to {self.workdir}; curves: {watch} {self.workdir}')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, one point of each curve."""
        if self._first:
            rounded = {key: float(f'{value:.7g}') for key, value in values.items()}
            with self._tolerate_io_errors():
                self._append(json.dumps({'step': step, 'time': round(time.time(), 3)} | rounded))
        for logger in self._loggers:
            logger.scalars(step, values)
        if self._events:
            with self._tolerate_io_errors():
                self._events.write_scalars(step, values)
                self._events.flush()

    def _append(self, line: str) -> None:
        self._lines.append(line)
        path = self._folder / 'metrics.jsonl'
        if storage.is_remote(path):  # a bucket's objects cannot be appended to
            path.write_text('\n'.join(self._lines) + '\n')
            return
        with path.open('a') as lines:
            lines.write(line + '\n')

    @contextlib.contextmanager
    def _tolerate_io_errors(self) -> Iterator[None]:
        """A full disk costs measurements, not the run; it is said once."""
        try:
            yield
        except storage.io_errors() as error:
            if not self._told:
                why = storage.reason(error)
                say(f'warning: measurements cannot be written: {why}; training goes on')
            self._told = True

    def training(self, step: int, metrics: dict[str, Any], clock: Throughput) -> None:
        """The metrics of a step, with the rate since the last call, and a line of progress."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        rate, wait = clock.lap(step)
        values |= {'images_per_second': rate, 'data_wait': wait}
        self.scalars(step, {f'train/{key}': value for key, value in values.items()})
        shown = '  '.join(
            f'{key} {values[key]:{form}}' for key, form in _SHOWN.items() if key in values
        )
        if clock.live:
            clock.show(f'{shown}  data wait {wait:.0%}')
        else:
            say(
                f'step {step}/{clock.last}  {shown}  {rate:.0f} images/s  '
                f'data wait {wait:.0%}  left {clock.left(step)}'
            )

    def text(self, name: str, text: str) -> None:
        """A text file in the workdir."""
        if self._first:
            with self._tolerate_io_errors():
                (self._folder / name).write_text(text + '\n')

    def bad_images(self, bad: dict[str, str]) -> None:
        """The images that could not be read, with the reason, in bad_images.txt."""
        if len(bad) > self._bad:
            self._bad = len(bad)
            rows = [f'{name}\t{reason}' for name, reason in sorted(bad.items())]
            self.text('bad_images.txt', '\n'.join(rows))
            say(f'{len(bad)} images cannot be read and are replaced by others: bad_images.txt')

    def views(self, grid: Float[np.ndarray, 'H W 3']) -> None:
        """The picture of augmented views, values in [0, 1]: views.png and TensorBoard."""
        from PIL import Image

        if self._first:
            picture = Image.fromarray(np.round(grid * 255).astype(np.uint8))
            with self._tolerate_io_errors(), (self._folder / 'views.png').open('wb') as file:
                picture.save(file, 'PNG')
        if self._events:
            self._events.write_images(0, {'views': grid[None]})

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._events:
            self._events.close()
        for logger in self._loggers:
            logger.close(failed=kind is not None)


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)['step'] <= step
    except ValueError:  # a line cut off by a kill
        return False
