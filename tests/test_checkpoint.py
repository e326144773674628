"""Tests of checkpoints/ (checkpoint, checkpoint_reader, pinned_checkpoint) and runtime/lock.py."""

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import corruptions
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from simsiam_jax import errors, patience
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader, workdirs
from simsiam_jax.runtime import lock

CONFIG, STEPS = corruptions.CONFIG, corruptions.STEPS


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    corruptions.save(tmp_path / 'run')
    return tmp_path / 'run'


def reopen(
    workdir: pathlib.Path, **kwargs
) -> contextlib.AbstractContextManager[checkpoint.Checkpoints]:
    return checkpoint.open(str(workdir), CONFIG, max_to_keep=3, **kwargs)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_open_never_restores_wrong_state_after_corruption(tmp_path: pathlib.Path) -> None:
    counts = corruptions.run(12, tmp_path, seed=1)
    assert counts['restored 22'] > 0
    assert counts.total() == 12


def passing_errors() -> list[Exception]:
    numbers = (errno.ESTALE, errno.EIO, errno.EMFILE, errno.ETIMEDOUT)
    names = ('INTERNAL', 'RESOURCE_EXHAUSTED', 'ABORTED', 'UNAVAILABLE')
    system = [OSError(number, os.strerror(number)) for number in numbers]
    return [*system, MemoryError(), *[ValueError(f'{name}: try again') for name in names]]


@pytest.mark.parametrize('error', passing_errors(), ids=lambda e: errors.reason(e))
def test_error_that_passes_is_not_damage(error, workdir, monkeypatch, capsys) -> None:
    read, failures = checkpoint_reader._read, iter([error])

    def fail_once(*args):
        for failure in failures:
            raise failure
        return read(*args)

    monkeypatch.setattr(checkpoint_reader, '_read', fail_once)
    with reopen(workdir) as checkpoints:
        assert checkpoints.start_step == 33
    assert not (workdir / workdirs.DAMAGED).exists()
    assert f'checkpoint {workdir}/checkpoints/33 can be used again' in capsys.readouterr().err


def test_list_steps_does_not_ask_storage_that_may_be_away(workdir, monkeypatch) -> None:
    monkeypatch.setattr(pathlib.Path, 'is_dir', lambda path: False)  # as if stat() failed
    monkeypatch.setattr(os.path, 'isdir', lambda path: False)
    assert checkpoint_reader.list_steps(workdir / 'checkpoints') == list(STEPS)


def test_error_that_stays_leaves_checkpoint_in_place(workdir, monkeypatch) -> None:
    def fail(*args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint_reader, '_read', fail)
    monkeypatch.setattr(patience, 'SECONDS', 0.2)
    with pytest.raises(errors.TemporaryError, match=r'33 cannot be used for \d+ s now: Stale'):
        checkpoint_reader.load(workdir, 'state')
    assert checkpoint_reader.list_steps(workdir / 'checkpoints') == list(STEPS)


def test_load_detects_16_flipped_bytes_by_checksum(workdir, capsys) -> None:
    state = corruptions.state_at(33)
    value = np.asarray(state.params['backbone']['fc']['kernel'])
    # The whole array is replaced in its format, as if the disk had returned different bytes.
    item = workdir / 'checkpoints' / '33' / 'state'
    tree = checkpoint_reader.load(workdir, 'state').tree
    flipped = tree['params']['backbone']['fc']['kernel'].copy()
    flipped.view(np.uint8).reshape(-1)[100:116] ^= 1
    tree['params']['backbone']['fc']['kernel'] = flipped
    shutil.rmtree(item)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, tree)
    assert not np.array_equal(flipped, value)
    assert checkpoint_reader.load(workdir, 'state').step == 22
    assert 'step 33' in capsys.readouterr().out
    # Undamaged parts and the encoder can still be loaded.
    assert checkpoint_reader.load(workdir, 'state', keys=('batch_stats',)).step == 33
    assert checkpoint_reader.load(workdir, 'encoder').step == 33
    with pytest.raises(errors.UserError, match=r'step 33 in .* is damaged'):
        checkpoint_reader.load(workdir, 'state', step=33)


def test_open_moves_damaged_step_and_saves_it_again(workdir, capsys) -> None:
    largest(workdir / 'checkpoints' / '33' / 'state').write_bytes(b'')
    with reopen(workdir) as checkpoints:
        assert checkpoints.start_step == 22
        assert 'warning: step 33' in capsys.readouterr().out
        assert (workdir / workdirs.DAMAGED / '33').is_dir()
        corruptions.same(checkpoints.restore(corruptions.state_at(0)), corruptions.state_at(22))
        checkpoints.save(corruptions.state_at(33))
    with reopen(workdir) as checkpoints:
        pass
    assert checkpoints.start_step == 33


def test_open_fails_if_all_steps_are_damaged(workdir) -> None:
    for step in STEPS:
        (workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').write_text('{"step": 1')
    with pytest.raises(errors.UserError, match='are damaged: step 33, 22, 11') as caught:
        reopen(workdir).__enter__()
    assert '\n' not in str(caught.value)
    assert not (workdir / lock.NAME).exists()


def test_restore_names_array_that_does_not_fit(workdir) -> None:
    with reopen(workdir) as checkpoints:
        state = corruptions.state_at(0)
        del state.params['projector']['fc']['bias']
        with pytest.raises(
            errors.UserError, match=r'params/projector/fc/bias is \(16,\), expected none'
        ):
            checkpoints.restore(state)


def test_keep_period_outlives_max_to_keep(tmp_path: pathlib.Path) -> None:
    with checkpoint.open(str(tmp_path), CONFIG, max_to_keep=1, keep_period=22) as checkpoints:
        for step in (11, 22, 33, 44, 55):
            checkpoints.save(corruptions.state_at(step))
    assert checkpoint_reader.list_steps(tmp_path / checkpoint_reader.FOLDER) == [22, 44, 55]


def test_pinned_checkpoint_outlives_max_to_keep_and_resume(tmp_path: pathlib.Path) -> None:
    def steps_after(steps: list[int], *pins: int | None) -> list[int]:
        with checkpoint.open(str(tmp_path), CONFIG, max_to_keep=1) as checkpoints:
            for pin in pins:
                assert checkpoints.pin(pin) == (None if pin is None else 11)
            for step in steps:
                checkpoints.save(corruptions.state_at(step))
        return sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())

    assert steps_after([11]) == [11]
    assert steps_after([22, 33], 12) == [11, 33]
    assert steps_after([44], 33) == [11, 44]  # pinned already, from before the first sign
    assert steps_after([55], None) == [55]


def test_failed_save_keeps_other_checkpoints_and_reports(workdir, monkeypatch) -> None:
    with reopen(workdir) as checkpoints:

        def full(step: int, **kwargs) -> None:
            (workdir / 'checkpoints' / f'{step}.orbax-checkpoint-tmp').mkdir()
            raise ValueError('RESOURCE_EXHAUSTED: writing d/1f2e: No space left on device [28]')

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, 'save', full)
            checkpoints.save(corruptions.state_at(44))
            text = checkpoints.failure(wait=True)
        assert text == (
            'step 44 cannot be saved: No space left on device; '
            f'checkpoints in {workdir}: 11, 22, 33'
        )
        assert checkpoints.failure() == ''
        assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'11', '22', '33'}
        checkpoints.save(corruptions.state_at(44))  # the disk has space again
        assert checkpoints.failure(wait=True) == ''
    assert checkpoint_reader.load(workdir, 'state').step == 44


def test_open_reports_read_only_workdir(workdir, monkeypatch) -> None:
    def refuse(self, path) -> None:
        raise OSError(30, os.strerror(30))

    # Patched, because no folder is read-only to root.
    monkeypatch.setattr(lock.Lock, '_write', refuse)
    with pytest.raises(errors.UserError, match='cannot be written: Read-only file system'):
        reopen(workdir).__enter__()


def test_lock_of_active_run_names_its_process(workdir, monkeypatch) -> None:
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    monkeypatch.setattr(lock, '_TIMEOUT', 2.0)
    message = f'active in .* process {os.getpid()} on host'
    with reopen(workdir), pytest.raises(errors.UserError, match=message):
        reopen(workdir).__enter__()
    assert not (workdir / lock.NAME).exists()
    with reopen(workdir):
        pass


def test_run_whose_lock_was_taken_over_stops(workdir, monkeypatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    monkeypatch.setattr(lock, '_exit', ended.append)
    other = {'host': 'elsewhere', 'pid': 7, 'run': 'b', 'beats': 0}
    with reopen(workdir):
        (workdir / lock.NAME).write_text('{"ho')  # being written
        time.sleep(0.2)
        assert not ended
        (workdir / lock.NAME).write_text(json.dumps(other))
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert 'process 7 on host elsewhere took over' in ended[0]


def test_lock_taken_over_from_dead_process(workdir, monkeypatch) -> None:
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    here = {'host': lock.socket.gethostname(), 'pid': ended.pid, 'run': 'a', 'beats': 3}
    monkeypatch.setattr(lock, '_TIMEOUT', 0.1)
    for holder in (here, here | {'host': 'elsewhere', 'pid': 1}):
        (workdir / lock.NAME).write_text(json.dumps(holder))
        with reopen(workdir):
            assert json.loads((workdir / lock.NAME).read_text())['pid'] == os.getpid()
    (workdir / lock.NAME).write_text('{"ho')  # killed while it was written
    with reopen(workdir):
        pass


def test_dead_lock_taken_over_by_one_of_four_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    monkeypatch.setattr(lock, '_TIMEOUT', 2.0)
    is_active, barrier = lock._is_active, threading.Barrier(4)

    def check_together(holder, path) -> bool:
        active = is_active(holder, path)
        if holder.get('run') == 'dead':
            barrier.wait(60)  # until all have seen the dead lock
        return active

    monkeypatch.setattr(lock, '_is_active', check_together)
    dead = {'host': lock.socket.gethostname(), 'pid': 2**30, 'run': 'dead', 'beats': 3}
    for _ in range(3):
        (tmp_path / lock.NAME).write_text(json.dumps(dead))

        def take(_) -> lock.Lock | str:
            try:
                return lock.Lock(epath.Path(tmp_path))
            except errors.UserError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            results = list(threads.map(take, range(4)))
        (taken,) = [result for result in results if isinstance(result, lock.Lock)]
        refusals = [result for result in results if isinstance(result, str)]
        assert all(f'process {os.getpid()} on host' in text for text in refusals)
        taken.release()
        assert list(tmp_path.iterdir()) == []


def test_save_returns_before_checkpoint_is_written(workdir, monkeypatch) -> None:
    with reopen(workdir) as checkpoints:
        may_end = threading.Event()
        write = checkpoints._manager.save
        monkeypatch.setattr(
            checkpoints._manager, 'save', lambda *a, **k: (may_end.wait(60), write(*a, **k))
        )
        state = corruptions.state_at(44)
        checkpoints.save(state)
        jax.tree.map(lambda x: x.delete(), state)  # as the next step's donation does
        may_end.set()
    corruptions.same(checkpoint_reader.load(workdir, 'state').tree, vars(corruptions.state_at(44)))


def test_open_removes_save_that_was_killed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r'no checkpoint in .*found: none'):
        checkpoint_reader.load(tmp_path, 'state')
    partial = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
    partial.mkdir(parents=True)
    with reopen(tmp_path) as checkpoints:
        assert checkpoints.start_step is None
    assert not partial.exists()


def test_save_waits_for_a_disk_that_fails_for_a_moment(workdir, monkeypatch, capsys) -> None:
    real, failures = ocp.CheckpointManager.save, [errno.ESTALE, errno.EIO]

    def failing(self: ocp.CheckpointManager, *arguments: object, **options: object) -> bool:
        if failures:
            raise OSError(failures[-1], os.strerror(failures.pop()))
        return real(self, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, 'save', failing)
    with reopen(workdir) as checkpoints:
        checkpoints.save(corruptions.state_at(44))
        assert checkpoints.failure(wait=True) == ''
    assert f'waiting up to 300 s for the workdir {workdir}: Input' in capsys.readouterr().err
    loaded = checkpoint_reader.load(workdir, 'state')
    corruptions.same(loaded.tree, vars(corruptions.state_at(44)))
    failures[:] = [errno.ESTALE]
    monkeypatch.setattr(patience, 'SECONDS', 0.0)
    with reopen(workdir) as checkpoints:
        checkpoints.save(corruptions.state_at(55))
        assert 'step 55 cannot be saved: the workdir' in checkpoints.failure(wait=True)
        assert checkpoints.storage_failed


def test_disk_that_fails_for_a_moment_is_not_empty(workdir, monkeypatch) -> None:
    real, failures = os.scandir, [OSError(errno.ESTALE, 'Stale file handle')]

    def failing(folder: epath.Path) -> object:
        if failures:
            raise failures.pop()
        return real(folder)

    monkeypatch.setattr(os, 'scandir', failing)
    assert checkpoint_reader.list_steps(workdir / 'checkpoints') == [11, 22, 33]
    assert failures == []
    assert checkpoint_reader.list_steps(workdir / 'none') == []
