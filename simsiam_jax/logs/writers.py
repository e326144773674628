"""Writing metrics to the terminal, metrics.jsonl, TensorBoard and other loggers."""

import contextlib
import gc
import json
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from simsiam_jax import errors, lazy_tf, patience
from simsiam_jax.logs import loggers as loggers_lib
from simsiam_jax.logs.progress import Throughput
from simsiam_jax.runtime import distributed, storage, versions
from simsiam_jax.terminal import say

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
      tensorboard: Write TensorBoard events; needs clu and TensorFlow.
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
        self._events: Any = None
        self._num_bad_images, self._warned, self._failed = 0, False, False
        self._first = jax.process_index() == 0
        if not self._first:
            return
        path = self._folder / 'metrics.jsonl'
        kept = path.read_text().splitlines() if path.exists() else []
        first = step + 1 if step else 0  # the first step that is written again
        self._lines = [line for line in kept if _is_before(line, first)]
        # Replacing the file at once keeps the old lines if the run is killed here.
        partial = self._folder / 'metrics.jsonl.partial'
        partial.write_text(''.join(line + '\n' for line in self._lines))
        partial.replace(path)
        if tensorboard:
            try:
                self._events = _open_events(workdir, first)
            except (errors.UserError, ModuleNotFoundError) as error:
                say(f'no TensorBoard: {error}')

    def start(self, images: int, steps_per_epoch: int) -> None:
        """Prints the workdir and the command that shows the curves.

        Each start of the run adds its time, versions and devices to starts.jsonl.
        """
        if self._first:
            start = {'time': round(time.time(), 3), 'step': self._start, 'images': images}
            path = self._folder / 'starts.jsonl'
            line = start | {'steps_per_epoch': steps_per_epoch} | versions.describe_process()
            with self._tolerate_io_errors():
                earlier = path.read_text() if path.exists() else ''
                path.write_text(earlier + json.dumps(line) + '\n')
        viewer = 'tensorboard --logdir' if self._events else 'python -m simsiam_jax.tools.report'
        say(f'writing to {self.workdir}; view curves with: {viewer} {self.workdir}')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each curve."""
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

    def before_training(self, section: str) -> dict[str, float]:
        """Returns what was written of step 0 as SECTION/NAME, by name; {} if another process."""
        lines = map(json.loads, self._lines if self._first else ())
        values = {key: x for line in lines if line['step'] == 0 for key, x in line.items()}
        start = f'{section}/'
        return {key.removeprefix(start): x for key, x in values.items() if key.startswith(start)}

    def _append(self, line: str) -> None:
        self._lines.append(line)
        path = self._folder / 'metrics.jsonl'
        if storage.is_remote(path):  # objects in a bucket cannot be appended to
            path.write_text('\n'.join(self._lines) + '\n')
            return
        with path.open('a') as lines:
            lines.write(line + '\n')

    @contextlib.contextmanager
    def _tolerate_io_errors(self) -> Iterator[None]:
        """Prints the first error of writing in this context and lets the run continue."""
        if self._failed:
            # A bucket's file that failed is written when it is freed: not over the next one.
            gc.collect()
            self._failed = False
        try:
            yield
        except patience.io_errors() as error:
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
            with self._tolerate_io_errors():
                (self._folder / name).write_text(text + '\n')

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


def _open_events(workdir: str, first: int) -> Any:
    """Returns a writer of events, at whose start TensorBoard drops the points from a step on."""
    tf = lazy_tf.load()
    from clu import metric_writers
    from tensorboard.compat.proto import event_pb2

    events = metric_writers.SummaryWriter(workdir)
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    start = event_pb2.Event(wall_time=time.time(), step=first, session_log=session)
    # Neither clu nor tf.summary has a function for events that are not summaries.
    resource = events._summary_writer._resource
    # TensorBoard drops nothing at the first start in a folder. Earlier versions wrote no starts.
    for _ in range(2):
        tf.raw_ops.ImportEvent(writer=resource, event=start.SerializeToString())
    return events


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)['step'] < step
    except ValueError:  # a kill truncated the line
        return False
