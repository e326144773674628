"""Optional loggers, Weights & Biases and MLflow, which receive the points of metrics.jsonl.

A resumed run logs to the same W&B or MLflow run, whose id is kept in WORKDIR/NAME.id. A thread
sends the points, so that no network delays or stops training.
"""

import functools
import importlib.util
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from etils import epath
from flax.traverse_util import flatten_dict

from simsiam_jax import errors
from simsiam_jax.terminal import say

# Seconds that a run waits for a logger at its start and at its end.
_TIMEOUT = 60.0


@runtime_checkable
class Logger(Protocol):
    """A run on a logging service, with the id by which it can be resumed."""

    id: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _Wandb:
    def __init__(self, project: str, run_id: str, workdir: str, config: dict[str, Any]):
        import wandb

        self.id = run_id or uuid.uuid4().hex[:8]
        folder = None if '://' in workdir else workdir
        self._run = wandb.init(
            project=project,
            id=self.id,
            resume='allow',
            name=epath.Path(workdir).name,
            dir=folder,
            settings=wandb.Settings(console='off'),  # the progress line is not output
        )
        self._run.config.update(config, allow_val_change=True)
        # W&B's own step cannot decrease, but a run that resumes from a checkpoint repeats steps.
        self._run.define_metric('*', step_metric='step')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({'step': step} | values)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, experiment: str, run_id: str, workdir: str, config: dict[str, Any]):
        from mlflow import entities, tracking

        self._entities, self._client = entities, tracking.MlflowClient()
        self.id = run_id
        if run_id:
            self._client.update_run(run_id, 'RUNNING')
            return
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        run = self._client.create_run(experiment_id, run_name=epath.Path(workdir).name)
        self.id = run.info.run_id
        for key, value in flatten_dict(config, sep='.').items():
            self._client.log_param(self.id, key, value)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(key, x, now, step) for key, x in values.items()]
        self._client.log_batch(self.id, metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, 'FAILED' if failed else 'FINISHED')


class AsyncLogger:
    """Opens and calls a logger in a thread, and prints its first failure.

    Args:
      name: Name of the logger, for messages.
      open_logger: Function that returns the logger; called in the thread.
      timeout: Seconds that the constructor and close() wait for the thread.
    """

    def __init__(self, name: str, open_logger: Callable[[], Logger], *, timeout: float = _TIMEOUT):
        self._name, self._open, self._timeout = name, open_logger, timeout
        self._points: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue()
        self._opened, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()
        if not self._opened.wait(timeout):
            say(f'warning: {name} did not answer in {timeout:.0f} s; training starts without it')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Queues the values of a step."""
        if self._thread.is_alive():
            self._points.put((step, values))

    def close(self, failed: bool) -> None:
        """Closes the logger when all points are sent, but waits no longer than the timeout."""
        self._points.put(failed)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            say(f'warning: {self._name} did not receive the last points; metrics.jsonl has them')

    def _send(self) -> None:
        try:
            logger = self._open()
        except Exception as error:  # the libraries raise errors of many types
            self._warn(error)
            return
        finally:
            self._opened.set()
        while not isinstance(item := self._points.get(), bool):
            try:
                logger.scalars(*item)
            except Exception as error:
                self._warn(error)
        try:
            logger.close(item)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            say(f'warning: {self._name}: {errors.reason(error)}; training continues')
        self._warned = True


_LOGGERS: dict[str, Callable[..., Logger]] = {'wandb': _Wandb, 'mlflow': _Mlflow}


def start(workdir: str, config: Mapping[str, Any], **projects: str) -> list[AsyncLogger]:
    """Starts the requested loggers on process 0.

    Args:
      workdir: Workdir of the run.
      config: Configuration, which becomes the parameters of the run.
      projects: W&B project as `wandb`, MLflow experiment as `mlflow`; '' disables.

    Returns:
      The loggers; none on other processes.

    Raises:
      UserError: The package of a requested logger is not installed.
    """
    projects = {name: project for name, project in projects.items() if project}
    for name, project in projects.items():
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder ./wandb is found without an origin
            raise errors.UserError(
                f'config.log.{name} is {project!r}, but {name} is not installed. Run pip install '
                f"{name}, or set config.log.{name} to ''"
            )
    if jax.process_index():
        return []
    plain = json.loads(json.dumps(config))
    return [
        AsyncLogger(name, functools.partial(_open, name, project, workdir, plain))
        for name, project in projects.items()
    ]


def _open(name: str, project: str, workdir: str, config: dict[str, Any]) -> Logger:
    path = epath.Path(workdir) / f'{name}.id'
    run_id = path.read_text().strip() if path.exists() else ''
    logger = _LOGGERS[name](project, run_id, workdir, config)
    path.write_text(logger.id + '\n')
    return logger
