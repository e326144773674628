"""Tests of logs/: TensorBoard; Weights & Biases and MLflow, if installed; any logger."""

import errno
import importlib.util
import json
import pathlib
import threading

import pytest

from simsiam_jax import errors, lazy_tf
from simsiam_jax.logs import loggers, metric_files, writers

CONFIG = {'batch_size': 8, 'optim': {'momentum': 0.9}, 'augment': {'crop_scale': (0.2, 1.0)}}


class Recorder:
    """A logger that records its points and fails at step 2."""

    opened: list['Recorder']

    def __init__(self, project: str, run_id: str, workdir: str, config: dict):
        self.id, self.config = run_id or f'{project}-{len(self.opened)}', config
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
    monkeypatch.setitem(loggers._LOGGERS, 'json', Recorder)  # an installed package


@pytest.mark.usefixtures('_recorded')
def test_restarted_run_logs_to_the_same_logger_id(tmp_path, capsys) -> None:
    for failed in (True, False):
        (logger,) = loggers.start(str(tmp_path), CONFIG, json='project', wandb='')
        for step in range(1, 5):
            logger.scalars(step, {'train/loss': -step / 10})
        logger.close(failed=failed)
    first, second = Recorder.opened
    assert first.id == second.id == 'project-0'
    assert first.points == [
        (1, {'train/loss': -0.1}),
        (3, {'train/loss': -0.3}),
        (4, {'train/loss': -0.4}),
        (-1, {'failed': True}),
    ]
    assert second.points[-1] == (-1, {'failed': False})
    assert first.config == CONFIG | {'augment': {'crop_scale': [0.2, 1.0]}}
    warning = 'warning: json: no route to host; training continues\n'
    assert capsys.readouterr().out == warning * 2  # once per run


def test_hanging_or_failing_logger_does_not_stop_training(capsys) -> None:
    never = threading.Event()
    logger = loggers.AsyncLogger('slow', never.wait, timeout=0.05)
    logger.scalars(1, {'train/loss': 0.0})
    logger.close(failed=False)
    output = capsys.readouterr().out
    assert 'warning: slow did not answer in 0 s; training starts without it' in output
    assert 'warning: slow did not receive the last points; metrics.jsonl has them' in output

    def refuse() -> loggers.Logger:
        raise RuntimeError('api_key is not configured')

    logger = loggers.AsyncLogger('strict', refuse)
    logger.scalars(1, {'train/loss': 0.0})
    logger.close(failed=False)
    expected = 'warning: strict: api_key is not configured; training continues\n'
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_missing_logger_package_raises_with_install_command(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(errors.UserError, match=rf"log\.{name} is 'mine'.*pip install {name}"):
        loggers.start(str(tmp_path), CONFIG, **{name: 'mine'})


# The libraries' own warnings are not errors of this package.
lenient = pytest.mark.filterwarnings('default')


@lenient
def test_mlflow_receives_points_and_configuration(tmp_path, monkeypatch) -> None:
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
def test_wandb_receives_points_and_configuration(tmp_path: pathlib.Path, monkeypatch) -> None:
    pytest.importorskip('wandb', reason='wandb is not installed')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    for step in (1, 2):
        (logger,) = loggers.start(str(tmp_path), CONFIG, wandb='collapse')
        logger.scalars(step, {'train/loss': -step / 10})
        logger.close(failed=False)
    files = sorted((tmp_path / 'wandb').glob('offline-run-*/run-*.wandb'))
    run_id = (tmp_path / 'wandb.id').read_text().strip()
    assert [file.stem for file in files] == [f'run-{run_id}'] * 2
    for file, value in zip(files, (b'-0.1', b'-0.2'), strict=True):
        for word in (b'collapse', b'momentum', b'train/loss', value):
            assert word in file.read_bytes()


@pytest.mark.parametrize('starts', [True, False], ids=['this version', 'earlier version'])
@pytest.mark.parametrize(('step', 'kept'), [(0, []), (2, [0, 1, 2])])
def test_resumed_run_replaces_points_of_repeated_steps(
    tmp_path, monkeypatch, step: int, kept: list, starts: bool
) -> None:
    tf = lazy_tf.load()
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.util import tensor_util

    for start, steps, loss in ((0, range(5), 1.0), (step, (3, 4, 5), 2.0)):
        with monkeypatch.context() as patch:
            if loss == 1.0 and not starts:  # events of earlier versions do not name the start
                patch.setattr(tf.raw_ops, 'ImportEvent', lambda **event: None)
            with writers.MetricWriter(str(tmp_path), tensorboard=True, step=start) as log:
                for at in steps:
                    log.scalars(at, {'loss': loss})
        # TensorBoard reads files in the order of their names: the second of the start, then a
        # counter as text, which would put the tenth file of a second before its ninth.
        (file,) = tmp_path.glob('events.out.*')
        file.rename(tmp_path / f'tfevents.{loss}')
    expected = [(at, 1.0) for at in kept] + [(3, 2.0), (4, 2.0), (5, 2.0)]
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(e.step, e.tensor_proto) for e in events.Tensors('loss')]
    assert [(at, float(tensor_util.make_ndarray(loss))) for at, loss in points] == expected
    lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    assert [(line['step'], line['loss']) for line in lines] == expected


def test_lines_of_an_outage_are_written_afterwards(tmp_path: pathlib.Path, capsys) -> None:
    workdir, away = tmp_path / 'run', tmp_path / 'away'
    workdir.mkdir()
    with writers.MetricWriter(str(workdir), tensorboard=False, step=0) as log:
        log.scalars(1, {'loss': 0.1})
        workdir.rename(away)
        log.scalars(2, {'loss': 0.2})
        away.rename(workdir)
        log.scalars(3, {'loss': 0.3})
        assert capsys.readouterr().out.count('metrics cannot be written: No such file') == 1
        threading.Timer(0.3, away.rename, [workdir]).start()
        workdir.rename(away)
        log.scalars(4, {'loss': 0.4})
        log.text('verdict.txt', 'good')  # waits
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    assert [(line['step'], line['loss']) for line in lines] == [
        (step, step / 10) for step in range(1, 5)
    ]
    assert (workdir / 'verdict.txt').read_text() == 'good\n'


def test_metrics_before_a_checkpoint_wait_for_the_storage(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, failures = metric_files.LineFile.flush, [OSError(errno.ESTALE, 'Stale')] * 3

    def fail_at_first(self: metric_files.LineFile) -> None:
        if failures:
            raise failures.pop()
        flush(self)

    with writers.MetricWriter(str(tmp_path), tensorboard=False, step=0) as log:
        monkeypatch.setattr(metric_files.LineFile, 'flush', fail_at_first)
        log.scalars(1, {'train/loss': -0.5})
        log.flush(wait=True)
        assert '"train/loss": -0.5' in (tmp_path / 'metrics.jsonl').read_text()
