"""Tests of runtime/storage.py and its users: the libraries' gs:// code against a local server."""

import contextlib
import json
import pathlib
import re
import shutil
import sys
import types
from collections.abc import Iterator

import corruptions
import fake_gcs
import jax
import numpy as np
import pytest
from PIL import Image

from simsiam_jax import errors, patience
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader, weights
from simsiam_jax.logs import writers
from simsiam_jax.pages import runs
from simsiam_jax.runtime import lock, profile, storage


@pytest.fixture(scope='module')
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if not shutil.which('openssl'):
        pytest.skip('openssl is not installed')
    # One server for all tests, because the libraries read the variables only once.
    with (
        fake_gcs.serve(tmp_path_factory.mktemp('storage')) as (bucket, variables),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        # Orbax needs only one attribute of Google's client. A stand-in avoids the large package.
        settings = types.SimpleNamespace(hierarchical_namespace_enabled=False)
        client = types.SimpleNamespace(get_bucket=lambda name: settings)
        module = types.SimpleNamespace(Client=lambda: client)
        patch.setitem(sys.modules, 'google.cloud.storage', module)
        patch.setattr('google.cloud.storage', module, raising=False)
        yield bucket


@pytest.fixture
def bucket(served):
    served.token.write_text(fake_gcs.TOKEN)
    return served


@pytest.fixture
def workdir(bucket, request: pytest.FixtureRequest) -> str:
    """One workdir per test, because TensorFlow caches listings for five seconds."""
    return f'gs://bucket/{request.node.name}'


def reopen(workdir: str) -> contextlib.AbstractContextManager[checkpoint.Checkpoints]:
    return checkpoint.open(workdir, corruptions.CONFIG, max_to_keep=3)


def names_below(bucket, folder: str) -> list[str]:
    return bucket.names(f'{folder}/'.removeprefix('gs://bucket/'))


def test_workdir_and_weights_are_found_in_the_home_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    assert storage.folder('~/run') == storage.folder(tmp_path / 'run')
    corruptions.save(str(tmp_path / 'run'))
    assert not weights.is_file('~/run')
    corruptions.same(weights.open_weights('~/run').params, corruptions.state_at(33).params)


def test_damaged_step_is_moved_aside_and_saved_again(bucket, workdir, capsys, monkeypatch) -> None:
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    corruptions.save(workdir)
    newest = names_below(bucket, f'{workdir}/checkpoints/33/state')
    largest = max(newest, key=lambda name: len(bucket.get(name)[1]))
    bucket.put(largest, bytes(len(bucket.get(largest)[1])))
    with reopen(workdir) as checkpoints:
        assert checkpoints.start_step == 22
        assert f'warning: step 33 in {workdir}' in capsys.readouterr().out
        assert len(names_below(bucket, f'{workdir}/damaged/33/state')) >= len(newest)
        assert not names_below(bucket, f'{workdir}/checkpoints/33')
        corruptions.same(checkpoints.restore(corruptions.state_at(0)), corruptions.state_at(22))
        with pytest.raises(errors.UserError, match=f'another run is active in {workdir}'):
            reopen(workdir).__enter__()
        assert checkpoints.pin(30) == 22
        for step in (33, 44, 55):
            checkpoints.save(corruptions.state_at(step))
        assert checkpoints.failure(wait=True) == ''
    assert not (storage.folder(workdir) / lock.NAME).exists()
    assert checkpoint_reader.list_steps(f'{workdir}/checkpoints') == [22, 33, 44, 55]
    corruptions.same(checkpoint_reader.load(workdir, 'state').tree, vars(corruptions.state_at(55)))


def test_unreachable_checkpoint_is_not_treated_as_damaged(bucket, workdir, monkeypatch) -> None:
    corruptions.save(workdir)
    everything = names_below(bucket, workdir)
    listed = checkpoint_reader.list_steps

    def list_then_refuse(folder) -> list[int]:
        steps = listed(folder)
        bucket.token.write_text('another')
        return steps

    monkeypatch.setattr(checkpoint_reader, 'list_steps', list_then_refuse)
    with pytest.raises(errors.UserError, match=r'checkpoints/33 cannot be read: .*401'):
        checkpoint_reader.load(workdir, 'state')
    bucket.token.write_text(fake_gcs.TOKEN)
    assert names_below(bucket, workdir) == everything
    bucket.token.write_text('another')
    array = checkpoint_reader._open_array(storage.folder(workdir) / 'checkpoints/33/state', 'step')
    with pytest.raises(ValueError, match='PERMISSION_DENIED') as refused:  # TensorStore's
        array.result()
    assert patience.is_forbidden(refused.value)


def test_incomplete_save_is_ignored_and_replaced(bucket, workdir) -> None:
    corruptions.save(workdir)
    (storage.folder(workdir) / 'checkpoints/33/commit_success.txt').unlink()  # written last
    loaded = weights.open_weights(workdir)
    corruptions.same(loaded.params, corruptions.state_at(22).params)
    with reopen(workdir) as checkpoints:
        assert checkpoints.start_step == 22
        checkpoints.save(corruptions.state_at(33))
        assert checkpoints.failure(wait=True) == ''
    corruptions.same(checkpoint_reader.load(workdir, 'state').tree, vars(corruptions.state_at(33)))


def test_metrics_and_pictures_are_written_to_bucket(bucket, workdir, capsys) -> None:
    for step, measured in ((0, (1, 2, 3)), (2, (3, 4))):
        with writers.MetricWriter(workdir, tensorboard=False, step=step) as log:
            log.start(10, 5)
            for at in measured:
                log.scalars(at, {'loss': at / 10})
            log.views(np.full((2, 3, 3), 0.5, np.float32))
    assert 'cannot be written' not in capsys.readouterr().out
    (run,) = runs.read_runs([workdir])
    assert run.curves['loss'] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [start['step'] for start in run.starts] == [0, 2]
    with (storage.folder(workdir) / 'views.png').open('rb') as file:
        assert Image.open(file).size == (3, 2)


@pytest.mark.parametrize('token', [fake_gcs.TOKEN, 'another'])
def test_profiler_trace_is_uploaded_or_stays_on_disk(bucket, workdir, token: str, capsys) -> None:
    with profile.StepProfiler('1:2', workdir) as profiler:
        for number in range(3):
            if number == 2:
                bucket.token.write_text(token)
            profiler.before_step(number, jax.numpy.zeros(2) + number)
    output = capsys.readouterr().out
    place = pathlib.Path(re.search(r'wrote a trace of steps 1 to 1: (.*)\n', output)[1])
    names = names_below(bucket, f'{workdir}/profile')
    refused = token != fake_gcs.TOKEN
    if refused:
        assert f'warning: {workdir}/profile cannot be written: ' in output
        assert names == []
        names = [path.name for path in place.rglob('*')]
        shutil.rmtree(place)
    assert (str(place).startswith('gs:')) != refused
    assert any(name.endswith('perfetto_trace.json.gz') for name in names)
    assert any(name.endswith('.xplane.pb') for name in names)


def test_missing_bucket_or_credentials_raise_user_errors(bucket, workdir, monkeypatch) -> None:
    with pytest.raises(
        errors.UserError,
        match=r'gs://none/run cannot be written: .* 404; check that the bucket exists',
    ):
        checkpoint.open('gs://none/run', corruptions.CONFIG, max_to_keep=1).__enter__()
    bucket.token.write_text('another')
    with pytest.raises(errors.UserError, match=r'cannot be written: .* 401; .*credentials'):
        reopen(workdir).__enter__()
    with pytest.raises(errors.UserError, match=f'{workdir} cannot be read: .* 401'):
        weights.open_weights(workdir)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'google.cloud.storage', None)
        patch.delattr('google.cloud.storage')
        with pytest.raises(errors.UserError, match='pip install google-cloud-storage'):
            reopen(workdir).__enter__()
    with pytest.raises(
        errors.UserError, match='ram://run is not a folder; expected a local path or gs://'
    ):
        writers.MetricWriter('ram://run', tensorboard=False, step=0)
    assert names_below(bucket, workdir) == []


def test_metrics_are_sent_in_parts_at_intervals(bucket, workdir, monkeypatch) -> None:
    name = f'{workdir}/metrics.jsonl'.removeprefix('gs://bucket/')
    monkeypatch.setattr(writers, 'INTERVAL', 1e9)
    with writers.MetricWriter(workdir, tensorboard=False, step=0) as log:
        log.scalars(1, {'loss': 0.1})
        log.scalars(2, {'loss': 0.2})
        log._pending.result()
        assert bucket.get(name)[1].count(b'\n') == 1  # the first point is sent at once
        sent = bucket.counts()['bytes']
        for step in range(3, 103):
            log.scalars(step, {'loss': 0.1})
        log.flush()
        log._pending.result()
        size = len(bucket.get(name)[1])
        assert bucket.get(name)[1].count(b'\n') == 102
        for step in range(103, 108):
            log.scalars(step, {'loss': 0.1})
            log.flush()
    assert [step for step, _ in runs.read_curves(workdir)['loss']] == list(range(1, 108))
    assert bucket.counts()['bytes'] - sent < 1.5 * size
    assert bucket.names(f'{name.rpartition("/")[0]}/.tmpcompose/') == []


def test_outage_loses_a_save_but_no_metrics_and_run_continues(bucket, workdir, capsys) -> None:
    with (
        reopen(workdir) as checkpoints,
        writers.MetricWriter(workdir, tensorboard=False, step=0) as log,
    ):
        bucket.token.write_text('another')
        log.scalars(1, {'loss': 0.1})
        log._pending.result()  # a thread sends it
        assert 'metrics cannot be written: ' in capsys.readouterr().out
        checkpoints.save(corruptions.state_at(11))
        assert checkpoints.failure(wait=True).startswith('step 11 cannot be saved: ')
        bucket.token.write_text(fake_gcs.TOKEN)
        log.scalars(2, {'loss': 0.2})
        sent = bucket.counts()['requests']
        log.flush()
        log._pending.result()
        assert bucket.counts()['requests'] > sent
        checkpoints.save(corruptions.state_at(22))
        assert checkpoints.failure(wait=True) == ''
    # From the bucket itself: for five seconds TensorFlow may return what it has read before.
    _, written = bucket.get(f'{workdir}/metrics.jsonl'.removeprefix('gs://bucket/'))
    assert [json.loads(line)['step'] for line in written.splitlines()] == [1, 2]
    assert checkpoint_reader.load(workdir, 'state').step == 22
