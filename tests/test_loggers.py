"""Weights & Biases and MLflow, where they are installed; and what holds for any logger."""

import importlib.util
import pathlib
import threading

import pytest

from simsiam_jax import errors
from simsiam_jax.logs import loggers

CONFIG = {'batch_size': 8, 'optim': {'momentum': 0.9}, 'augment': {'crop_scale': (0.2, 1.0)}}


class Recorder:
    """A logger that keeps its points, and cannot take those of step 2."""

    opened: list['Recorder']

    def __init__(self, place: str, identity: str, workdir: str, config: dict):
        self.id, self.config = identity or f'{place}-{len(self.opened)}', config
        self.points: list[tuple[int, dict[str, float]]] = []
        self.opened.append(self)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise ConnectionError('no route to host\nand more')
        self.points.append((step, values))

    def close(self, failed: bool) -> None:
        self.points.append((-1, {'failed': failed}))


@pytest.fixture
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.opened = []
    monkeypatch.setitem(loggers._KINDS, 'json', Recorder)  # a package that is there


@pytest.mark.usefixtures('_recorded')
def test_a_restarted_run_goes_on_under_its_id(tmp_path, capsys) -> None:
    for failed in (True, False):
        (logger,) = loggers.start(str(tmp_path), CONFIG, json='place', wandb='')
        for step in range(1, 5):
            logger.scalars(step, {'train/loss': -step / 10})
        logger.close(failed=failed)
    first, second = Recorder.opened
    assert first.id == second.id == 'place-0'
    assert first.points == [
        (1, {'train/loss': -0.1}),
        (3, {'train/loss': -0.3}),
        (4, {'train/loss': -0.4}),
        (-1, {'failed': True}),
    ]
    assert second.points[-1] == (-1, {'failed': False})
    assert first.config == CONFIG | {'augment': {'crop_scale': [0.2, 1.0]}}
    warning = 'warning: json: no route to host; training goes on\n'
    assert capsys.readouterr().out == warning * 2  # once a run


def test_a_logger_that_hangs_or_fails_holds_up_nothing(capsys) -> None:
    never = threading.Event()
    logger = loggers.AsyncLogger('slow', never.wait, patience=0.05)
    logger.scalars(1, {'train/loss': 0.0})
    logger.close(failed=False)
    told = capsys.readouterr().out
    assert 'slow has not answered in 0 s; training begins without it' in told
    assert 'slow has not taken the last points' in told

    def refused() -> loggers.Logger:
        raise RuntimeError('api_key is not configured')

    logger = loggers.AsyncLogger('strict', refused)
    logger.scalars(1, {'train/loss': 0.0})
    logger.close(failed=False)
    expected = 'warning: strict: api_key is not configured; training goes on\n'
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_missing_package_is_told_with_the_command(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(errors.UserError, match=rf"log\.{name} is 'mine'.*pip install {name}"):
        loggers.start(str(tmp_path), CONFIG, **{name: 'mine'})


# What the libraries warn of is not ours to mend.
lenient = pytest.mark.filterwarnings('default')


@lenient
def test_mlflow_has_the_points_and_the_configuration(tmp_path, monkeypatch) -> None:
    tracking = pytest.importorskip('mlflow.tracking', reason='mlflow is not installed')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path / "mlflow.db"}')
    for step in (1, 2):
        (logger,) = loggers.start(str(tmp_path), CONFIG, mlflow='collapse')
        logger.scalars(step, {'train/loss': -step / 10, 'eval/knn_top1': 0.5})
        logger.close(failed=step == 1)
    client = tracking.MlflowClient()
    experiment = client.get_experiment_by_name('collapse')
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == 'FINISHED'
    assert run.data.params == {
        'batch_size': '8',
        'optim.momentum': '0.9',
        'augment.crop_scale': '[0.2, 1.0]',
    }
    history = client.get_metric_history(run.info.run_id, 'train/loss')
    assert [(point.step, point.value) for point in history] == [(1, -0.1), (2, -0.2)]


@lenient
def test_wandb_has_the_points_and_the_configuration(tmp_path: pathlib.Path, monkeypatch) -> None:
    pytest.importorskip('wandb', reason='wandb is not installed')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    for step in (1, 2):
        (logger,) = loggers.start(str(tmp_path), CONFIG, wandb='collapse')
        logger.scalars(step, {'train/loss': -step / 10})
        logger.close(failed=False)
    files = sorted((tmp_path / 'wandb').glob('offline-run-*/run-*.wandb'))
    identity = (tmp_path / 'wandb.id').read_text().strip()
    assert [file.stem for file in files] == [f'run-{identity}'] * 2
    for file, value in zip(files, (b'-0.1', b'-0.2'), strict=True):
        for word in (b'collapse', b'momentum', b'train/loss', value):
            assert word in file.read_bytes()
