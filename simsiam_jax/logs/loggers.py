"""Weights & Biases and MLflow: the same points as metrics.jsonl, where the user asks for them.

A restarted run goes on in the same one there: its id is kept in WORKDIR/NAME.id. Points are handed
over by a thread; no network holds up or ends the training.
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

# Seconds that a run waits for a logger, when it begins and when it has ended.
_PATIENCE = 60.0


@runtime_checkable
class Logger(Protocol):
    """A run on the other side."""

    id: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _Wandb:
    def __init__(self, project: str, identity: str, workdir: str, config: dict[str, Any]):
        import wandb

        self.id = identity or uuid.uuid4().hex[:8]
        folder = None if '://' in workdir else workdir
        self._run = wandb.init(
            project=project,
            id=self.id,
            resume='allow',
            name=epath.Path(workdir).name,
            dir=folder,
            settings=wandb.Settings(console='off'),  # it would take the live line for output
        )
        self._run.config.update(config, allow_val_change=True)
        # An axis of our own: a run that goes on from a checkpoint may go back some steps.
        self._run.define_metric('*', step_metric='step')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({'step': step} | values)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, experiment: str, identity: str, workdir: str, config: dict[str, Any]):
        from mlflow import entities, tracking

        self._entities, self._client = entities, tracking.MlflowClient()
        self.id = identity
        if identity:
            self._client.update_run(identity, 'RUNNING')
            return
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        self.id = self._client.create_run(where, run_name=epath.Path(workdir).name).info.run_id
        for key, value in flatten_dict(config, sep='.').items():
            self._client.log_param(self.id, key, value)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [self._entities.Metric(key, x, now, step) for key, x in values.items()]
        self._client.log_batch(self.id, points)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, 'FAILED' if failed else 'FINISHED')


class AsyncLogger:
    """A logger behind a thread, which also opens it; its failures are said once.

    Args:
      open_logger: () -> the logger; called by the thread.
      patience: so many seconds the constructor and close() wait for the thread.
    """

    def __init__(
        self, name: str, open_logger: Callable[[], Logger], *, patience: float = _PATIENCE
    ):
        self._name, self._open, self._patience = name, open_logger, patience
        self._points: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue()
        self._opened, self._told = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        if not self._opened.wait(patience):
            say(f'{name} has not answered in {patience:.0f} s; training begins without it')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._thread.is_alive():
            self._points.put((step, values))

    def close(self, failed: bool) -> None:
        """Waits until all points are handed over, but not for ever."""
        self._points.put(failed)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            say(f'warning: {self._name} has not taken the last points: metrics.jsonl has them')

    def _work(self) -> None:
        try:
            logger = self._open()
        except Exception as error:  # of many types, as the library's networks have them
            self._tell(error)
            return
        finally:
            self._opened.set()
        while not isinstance(item := self._points.get(), bool):
            try:
                logger.scalars(*item)
            except Exception as error:
                self._tell(error)
        try:
            logger.close(item)
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            say(f'warning: {self._name}: {errors.reason(error)}; training goes on')
        self._told = True


_KINDS: dict[str, Callable[..., Logger]] = {'wandb': _Wandb, 'mlflow': _Mlflow}


def start(workdir: str, config: Mapping[str, Any], **asked: str) -> list[AsyncLogger]:
    """The loggers that are asked for, on the first process.

    Args:
      config: becomes the run's parameters.
      asked: wandb's project and mlflow's experiment; '': not asked for.

    Raises:
      UserError: a package is not installed.
    """
    asked = {name: place for name, place in asked.items() if place}
    for name, place in asked.items():
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder of its points is no package
            raise errors.UserError(
                f'config.log.{name} is {place!r}, and {name} is not installed; pip install {name}, '
                f'or leave config.log.{name} away'
            )
    if jax.process_index():
        return []
    plain = json.loads(json.dumps(config))
    return [
        AsyncLogger(name, functools.partial(_open, name, place, workdir, plain))
        for name, place in asked.items()
    ]


def _open(name: str, place: str, workdir: str, config: dict[str, Any]) -> Logger:
    path = epath.Path(workdir) / f'{name}.id'
    known = path.read_text().strip() if path.exists() else ''
    logger = _KINDS[name](place, known, workdir, config)
    path.write_text(logger.id + '\n')
    return logger
