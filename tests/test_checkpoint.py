"""Checkpoints: whole or passed over, kept, locked, and cheap to make."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import corruptions
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader
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


def test_random_corruptions_never_restore_wrongly(tmp_path: pathlib.Path) -> None:
    counts = corruptions.run(12, tmp_path, seed=1)
    assert counts['restored 22'] > 0
    assert counts.total() == 12


def test_sixteen_flipped_bytes_are_found_by_the_checksum(workdir, capsys) -> None:
    state = corruptions.state_at(33)
    value = np.asarray(state.params['backbone']['fc']['kernel'])
    # As if the disk had given other bytes: the array on it is replaced whole, format and all.
    item = workdir / 'checkpoints' / '33' / 'state'
    tree = checkpoint_reader.load(workdir, 'state').tree
    bent = tree['params']['backbone']['fc']['kernel'].copy()
    bent.view(np.uint8).reshape(-1)[100:116] ^= 1
    tree['params']['backbone']['fc']['kernel'] = bent
    shutil.rmtree(item)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, tree)
    assert not np.array_equal(bent, value)
    assert checkpoint_reader.load(workdir, 'state').step == 22
    assert 'step 33' in capsys.readouterr().out
    # The parts that are whole can still be had, and so can the encoder.
    assert checkpoint_reader.load(workdir, 'state', keys=('batch_stats',)).step == 33
    assert checkpoint_reader.load(workdir, 'encoder').step == 33
    with pytest.raises(errors.UserError, match='damaged: step 33'):
        checkpoint_reader.load(workdir, 'state', step=33)


def test_a_damaged_step_goes_aside_and_is_made_again(workdir, capsys) -> None:
    largest(workdir / 'checkpoints' / '33' / 'state').write_bytes(b'')
    with reopen(workdir) as checkpoints:
        assert checkpoints.latest_step == 22
        assert 'warning: step 33' in capsys.readouterr().out
        assert (workdir / checkpoint.DAMAGED / '33').is_dir()
        corruptions.same(checkpoints.restore(corruptions.state_at(0)), corruptions.state_at(22))
        checkpoints.save(corruptions.state_at(33))
    with reopen(workdir) as checkpoints:
        pass
    assert checkpoints.latest_step == 33


def test_nothing_is_begun_anew_where_all_steps_are_damaged(workdir) -> None:
    for step in STEPS:
        (workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').write_text('{"step": 1')
    with pytest.raises(errors.UserError, match='damaged: step 33, 22, 11') as caught:
        reopen(workdir).__enter__()
    assert '\n' not in str(caught.value)
    assert not (workdir / lock.NAME).exists()


def test_another_structure_is_refused_by_name(workdir) -> None:
    with reopen(workdir) as checkpoints:
        state = corruptions.state_at(0)
        del state.params['projector']['fc']['bias']
        with pytest.raises(
            errors.UserError, match=r'params/projector/fc/bias is \(16,\), expected not'
        ):
            checkpoints.restore(state)


def test_keep_every_outlives_keep(tmp_path: pathlib.Path) -> None:
    with checkpoint.open(str(tmp_path), CONFIG, max_to_keep=1, keep_period=22) as checkpoints:
        for step in (11, 22, 33, 44, 55):
            checkpoints.save(corruptions.state_at(step))
    assert checkpoint_reader.list_steps(tmp_path / checkpoint_reader.FOLDER) == [22, 44, 55]


def test_a_failed_save_keeps_the_others_and_says_so(workdir, monkeypatch) -> None:
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
        checkpoints.save(corruptions.state_at(44))  # there is room again
        assert checkpoints.failure(wait=True) == ''
    assert checkpoint_reader.load(workdir, 'state').step == 44


def test_a_read_only_workdir_is_told_in_one_line(workdir, monkeypatch) -> None:
    def refuse(self, path) -> None:
        raise OSError(30, os.strerror(30))

    # By hand: to root no folder is read-only.
    monkeypatch.setattr(lock.Lock, '_write', refuse)
    with pytest.raises(errors.UserError, match='cannot be written: Read-only file system'):
        reopen(workdir).__enter__()


def test_a_workdir_in_use_is_refused_and_its_holder_named(workdir, monkeypatch) -> None:
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    monkeypatch.setattr(lock, '_TIMEOUT', 2.0)
    message = f'active in .* process {os.getpid()} on host'
    with reopen(workdir), pytest.raises(errors.UserError, match=message):
        reopen(workdir).__enter__()
    assert not (workdir / lock.NAME).exists()
    with reopen(workdir):
        pass


def test_locks_of_the_dead_are_taken_over(workdir, monkeypatch) -> None:
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


def test_of_several_that_find_a_lock_dead_one_takes_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, 'HEARTBEAT', 0.05)
    monkeypatch.setattr(lock, '_TIMEOUT', 2.0)
    is_active, found = lock._is_active, threading.Barrier(4)

    def all_judge_first(holder, path) -> bool:
        active = is_active(holder, path)
        if holder.get('run') == 'dead':
            found.wait(60)  # before any goes on
        return active

    monkeypatch.setattr(lock, '_is_active', all_judge_first)
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


def test_a_save_returns_before_it_is_written(workdir, monkeypatch) -> None:
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


def test_a_killed_first_save_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match='a checkpoint was expected'):
        checkpoint_reader.load(tmp_path, 'state')
    left = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
    left.mkdir(parents=True)
    with reopen(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
    assert not left.exists()
