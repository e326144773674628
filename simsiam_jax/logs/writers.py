"""Writing metrics to the terminal, metrics.jsonl, TensorBoard and other loggers."""

import concurrent.futures
import functools
import gc
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from simsiam_jax import errors, patience
from simsiam_jax.logs import loggers as loggers_lib
from simsiam_jax.logs import metric_files
from simsiam_jax.logs.progress import Throughput
from simsiam_jax.runtime import distributed, storage, versions
from simsiam_jax.terminal import say

# Seconds between two uploads of metrics to a bucket, which also happen at each checkpoint.
INTERVAL = 60.0

# Metrics that progress lines show, if measured, with their formats.
_PROGRESS = {'loss': '.4f', 'z_std': '.3f', 'top1': '.3f', 'lr': '.4g'}


def open_log(workdir: str, config: dict[str, Any], step: int) -> 'MetricWriter':
    """Opens the writers that config['log'] requests.

    Args:
      workdir: Workdir of the run; exists.
      config: Configuration of the run.
      step: Step from which the run starts or resumes.

    Raises:
      UserError: The package of a requested logger is not installed.
    """
    log = config['log']
    return MetricWriter(
        workdir,
        tensorboard=log['tensorboard'],
        step=step,
        loggers=loggers_lib.start(workdir, config, wandb=log['wandb'], mlflow=log['mlflow']),
    )


class MetricWriter:
    """Writes metrics to metrics.jsonl and TensorBoard events, and progress to the terminal.

    Every process may call it, but only process 0 writes. The end of its context closes it.

    Args:
      workdir: Workdir of the run; exists.
      tensorboard: Write TensorBoard events; needs TensorFlow.
      step: Step from which the run starts or resumes; what was written of later steps is dropped.
      loggers: Loggers that receive the same metrics.
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
        self._events: metric_files.EventFile | None = None
        self._sent = -math.inf  # time of the last upload to a bucket
        self._thread, self._pending = None, concurrent.futures.Future[None]()
        self._num_bad_images, self._warned, self._failed = 0, False, False
        self._first = jax.process_index() == 0
        if not self._first:
            return
        if storage.is_remote(workdir):  # a request may take minutes there
            self._thread = concurrent.futures.ThreadPoolExecutor(1)
        first = step + 1 if step else 0  # the first step that is written again
        make = functools.partial(metric_files.LineFile, self._folder, first)
        self._lines = patience.call(make, f'the workdir {workdir}')
        if tensorboard:
            try:
                self._events = patience.call(
                    functools.partial(metric_files.EventFile, workdir, first),
                    f'the workdir {workdir}',
                    lambda e: isinstance(e, patience.io_errors()) and not patience.is_forbidden(e),
                )
            except (errors.UserError, ModuleNotFoundError) as error:
                say(f'no TensorBoard: {error}')

    def start(self, images: int, steps_per_epoch: int) -> None:
        """Prints the workdir and the command that shows the curves.

        Each start of the run adds its time, versions and devices to starts.jsonl.
        """
        if self._first:
            start = {'time': round(time.time(), 3), 'step': self._start, 'images': images}
            path = self._folder / 'starts.jsonl'
            start |= {'steps_per_epoch': steps_per_epoch} | versions.describe_process()
            line = json.dumps(start) + '\n'
            self._do(lambda: path.write_text(storage.read_text(path) + line))
        viewer = 'tensorboard --logdir' if self._events else 'python -m simsiam_jax.tools.report'
        say(f'writing to {self.workdir}; view curves with: {viewer} {self.workdir}')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each curve."""
        if self._first:
            rounded = {key: float(f'{value:.7g}') for key, value in values.items()}
            line = json.dumps({'step': step, 'time': round(time.time(), 3)} | rounded)
            self._do(lambda: self._lines.append(line), wait=False)
            if self._events:
                self._do(functools.partial(self._events.scalars, step, values), wait=False)
            if self._thread is None or time.monotonic() - self._sent >= INTERVAL:
                self.flush()
        for logger in self._loggers:
            logger.scalars(step, values)

    def flush(self, *, wait: bool = False) -> None:
        """Writes the metrics so far.

        Args:
          wait: Waits for storage that is away. Set it before a checkpoint is saved: a run that
            resumes from it never writes earlier metrics again.
        """
        if self._first:
            self._sent = time.monotonic()
            self._do(self._lines.flush, wait=wait)
            if self._events:
                self._do(self._events.flush, wait=wait)

    def before_training(self, section: str) -> dict[str, float]:
        """Returns what was written of step 0 as SECTION/NAME, by name; {} if another process."""
        lines = map(json.loads, self._lines.kept if self._first else ())
        values = {key: x for line in lines if line['step'] == 0 for key, x in line.items()}
        start = f'{section}/'
        return {key.removeprefix(start): x for key, x in values.items() if key.startswith(start)}

    def _do(self, write: Callable[[], object], *, wait: bool = True) -> None:
        """Calls a function that writes to the workdir, for a bucket in a thread.

        Args:
          write: Function to call, again if the storage fails for a moment.
          wait: Waits for the storage; otherwise, what could not be written follows later.
        """
        if self._thread is None:
            self._attempt(write, wait)
            return
        if self._pending.done():
            self._pending.result()  # raises what is no error of the storage
        self._pending = self._thread.submit(self._attempt, write, wait)

    def _attempt(self, write: Callable[[], object], wait: bool) -> None:
        """Prints the first error of the storage and lets the run continue."""
        if self._failed:
            # A bucket's file that failed is written when it is freed: not over the next one.
            gc.collect()
            self._failed = False
        try:
            if wait:
                patience.call(write, f'the workdir {self.workdir}', patience.is_away)
            else:
                write()
        except errors.TemporaryError as error:
            self._warn(error)
        except patience.io_errors() as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._failed = True
        if not self._warned:
            reason = storage.reason(error)
            say(f'warning: metrics cannot be written: {reason}; training continues')
        self._warned = True

    def training(self, step: int, metrics: dict[str, Any], throughput: Throughput) -> None:
        """Writes the metrics of a step, with the rate since the last call, and a progress line."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        rate, wait = throughput.lap(step)
        values |= {'images_per_second': rate, 'data_wait': wait}
        self.scalars(step, {f'train/{key}': value for key, value in values.items()})
        progress = '  '.join(
            f'{key} {values[key]:{form}}' for key, form in _PROGRESS.items() if key in values
        )
        if throughput.live:
            throughput.show(f'{progress}  data wait {wait:.0%}')
        else:
            say(
                f'step {step}/{throughput.last}  {progress}  {rate:.0f} images/s  '
                f'data wait {wait:.0%}  eta {throughput.eta(step)}'
            )

    def text(self, name: str, text: str) -> None:
        """Writes a text file in the workdir."""
        if self._first:
            self._do(lambda: (self._folder / name).write_text(text + '\n'))

    def bad_images(self, bad: dict[str, str]) -> None:
        """Writes unreadable images and the reasons to bad_images.txt, and prints their number.

        Every process must call it, with the images that it could not read.
        """
        bad = dict(bad)  # threads add more
        if sum(distributed.gather(len(bad))) != self._num_bad_images:
            parts = distributed.gather(bad)
            self._num_bad_images = sum(map(len, parts))
            bad = {name: reason for part in parts for name, reason in part.items()}
            rows = [f'{name}\t{reason}' for name, reason in sorted(bad.items())]
            self.text('bad_images.txt', '\n'.join(rows))
            say(f'{len(bad)} unreadable images are replaced by others; see bad_images.txt')

    def views(self, grid: Float[np.ndarray, 'H W 3']) -> None:
        """Writes a picture of augmented views, values in [0, 1], to views.png and TensorBoard."""
        from PIL import Image

        if self._first:
            picture = io.BytesIO()
            Image.fromarray(np.round(grid * 255).astype(np.uint8)).save(picture, 'PNG')
            self._do(lambda: (self._folder / 'views.png').write_bytes(picture.getvalue()))
        if self._events:
            self._do(functools.partial(self._events.image, 'views', grid), wait=False)

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._first:
            self._do(self._lines.flush)
        if self._events:
            self._do(self._events.close)
        if self._thread:
            self._thread.shutdown()
            self._pending.result()
        for logger in self._loggers:
            logger.close(failed=kind is not None)
