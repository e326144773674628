"""Checkpoints by Orbax: the whole state for resuming, the encoder alone for everybody else."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from simsiam_jax import errors, migration
from simsiam_jax._version import __version__
from simsiam_jax.checkpoints import checkpoint_reader, same_run
from simsiam_jax.checkpoints.pinned_checkpoint import PinnedStep
from simsiam_jax.runtime import distributed, storage
from simsiam_jax.runtime.lock import Lock
from simsiam_jax.terminal import say
from simsiam_jax.training.step import TrainState

# Folder of a workdir for damaged checkpoints.
DAMAGED = 'damaged'

_PINNED = 'pinned.json'


def encoder_variables(state: TrainState) -> dict[str, Any]:
    """The backbone's {'params', 'batch_stats'}."""
    return {
        'params': state.params['backbone'],
        'batch_stats': state.batch_stats['backbone'],
    }


@contextlib.contextmanager
def open(
    workdir: str,
    config: Mapping[str, Any],
    *,
    max_to_keep: int,
    keep_period: int = 0,
    images: Mapping[str, Any] | None = None,
    free: Sequence[str] = same_run.FREE,
    place: Sequence[str] = same_run.PLACE,
) -> Iterator['Checkpoints']:
    """Opens the checkpoints of a run, which no other run can use until the context ends.

    Loads the newest whole checkpoint, and moves newer, damaged ones to WORKDIR/damaged: training
    will save these steps again.

    Args:
      workdir: Folder of the run, created if it is missing.
      config: Configuration of the run, stored in WORKDIR/config.json and in each checkpoint.
      max_to_keep: Number of the latest checkpoints that are kept.
      keep_period: Also keeps the checkpoints at multiples of this number of steps; 0 disables.
      images: Number and digest of the training images, as sources.fingerprint returns them.
      free: Keys and sections of the configuration that may differ from the checkpoint's.
      place: Keys that may differ if `images` do not.

    Raises:
      UserError: The workdir cannot be written, is in use, or has checkpoints of a different
        configuration or damaged ones only.
    """
    given = same_run.RunIdentity(migration.complete(config), dict(images or {}))
    folder = storage.folder(workdir)
    with contextlib.ExitStack() as stack:
        try:
            _lock(folder, stack)
            newest = _load_newest(folder)
            if newest is not None and newest.step:  # step 0 is converted weights of any run
                if problem := same_run.refusal(folder, given, newest.run, free=free, place=place):
                    raise errors.UserError(problem)
                for note in same_run.notes(given, newest.run, place=place):
                    say(note)
            manager = None
            if jax.process_index() == 0:
                _move_damaged(folder, newest)
                _write_config(folder, given.config)
                manager = _open_manager(folder, max_to_keep, keep_period)
                stack.callback(manager.close)
        except storage.io_errors() as error:
            raise errors.UserError(_cannot_write(workdir, error)) from error
        checkpoints = Checkpoints(folder, given, newest, manager)
        stack.callback(checkpoints.wait)
        yield checkpoints


def _lock(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    """Process 0 creates and locks the workdir until the stack ends; a failure reaches all."""
    problem = ''
    if jax.process_index() == 0:
        try:
            storage.require_client(folder)
            stack.callback(Lock(folder).release)
            (folder / checkpoint_reader.FOLDER).mkdir(exist_ok=True)
        except errors.UserError as error:
            problem = str(error)
        except storage.io_errors() as error:
            problem = _cannot_write(folder, error)
    if problem := distributed.broadcast_from_process_0(problem):
        raise errors.UserError(problem)


def _load_newest(folder: epath.Path) -> checkpoint_reader.CheckpointItem | None:
    if not checkpoint_reader.list_steps(folder / checkpoint_reader.FOLDER):
        return None
    return checkpoint_reader.load(folder, 'state')


def _move_damaged(folder: epath.Path, newest: checkpoint_reader.CheckpointItem | None) -> None:
    for step in newest.damaged if newest else ():
        target = folder / DAMAGED / str(step)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rmtree()
        (folder / checkpoint_reader.FOLDER / str(step)).rename(target)


def _write_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
    stamp = {'format': migration.FORMAT, 'version': __version__}
    partial = folder / 'config.json.partial'
    partial.write_text(json.dumps(stamp | dict(config), indent=2) + '\n')
    partial.replace(folder / 'config.json')


def _open_manager(folder: epath.Path, max_to_keep: int, keep_period: int) -> ocp.CheckpointManager:
    for partial in (folder / checkpoint_reader.FOLDER).glob('*.orbax-checkpoint-tmp*'):
        partial.rmtree()  # left by a save that was killed
    # By process 0 alone: the state is the same in every process, so none needs to wait.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix='checkpoints'
    )
    if (old := folder / 'held.json').exists():  # written by version 0.1.0
        old.replace(folder / _PINNED)
    policies = [preservation_policy.LatestN(max_to_keep), PinnedStep(folder / _PINNED)]
    if keep_period:
        policies.append(preservation_policy.EveryNSteps(keep_period))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=False,
        enable_async_checkpointing=False,  # Checkpoints.save has a thread of its own
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(folder / checkpoint_reader.FOLDER, options=options)


class Checkpoints:
    """The checkpoints of a run: WORKDIR/checkpoints/STEP/{state,encoder,meta}; see open().

    Process 0 writes them, from a copy of the state on the host, while training continues.

    Args:
      folder: Workdir of the run.
      run: Stored with each checkpoint.
      newest: Checkpoint to start from; None starts at step 0.
      manager: Orbax's manager; None in all processes but the first.
    """

    def __init__(
        self,
        folder: epath.Path,
        run: same_run.RunIdentity,
        newest: checkpoint_reader.CheckpointItem | None,
        manager: ocp.CheckpointManager | None,
    ):
        self._folder, self._run, self._start, self._manager = folder, run, newest, manager
        self._pinned = PinnedStep(folder / _PINNED)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[Any] = self._thread.submit(int)
        self._failure = ''

    @property
    def latest_step(self) -> int | None:
        """What the run starts from; None where there is no checkpoint, 0 for converted weights."""
        return self._start.step if self._start else None

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless it is there already.

        Returns when the state is copied; failure() says whether it could be written.
        """
        step = int(state.step)
        if self._manager is None:
            return
        concurrent.futures.wait([self._pending])  # one copy at a time
        if step not in self._manager.all_steps():
            # Copies: on a CPU device_get gives the devices' own buffers, which training uses.
            host = jax.tree.map(np.array, jax.device_get(state))
            self._pending = self._thread.submit(self._write, step, host)

    def _write(self, step: int, state: TrainState) -> None:
        assert self._manager is not None
        items = {'state': vars(state), 'encoder': encoder_variables(state)}
        try:
            size = sum(x.nbytes for x in jax.tree.leaves(items))
            if not storage.is_remote(self._folder) and shutil.disk_usage(self._folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            meta: dict[str, Any] = {
                'format': migration.FORMAT,
                'version': __version__,
                'step': step,
                **dataclasses.asdict(self._run),
                'items': {name: checkpoint_reader.describe(tree) for name, tree in items.items()},
            }
            args = ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave(meta | {'seal': checkpoint_reader.seal(meta)}),
            )
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # of many types, by what failed and where
            self._failure = f'step {step} cannot be saved: {_reason(error)}'
            for left in (self._folder / checkpoint_reader.FOLDER).glob(f'{step}.*'):
                left.rmtree()  # half of it, on a disk that may be full
            self._manager.reload()

    def failure(self, *, wait: bool = False) -> str:
        """Why the last save failed, and what is there; '' if it did not. Said once.

        Args:
          wait: until the last save has ended.
        """
        if wait:
            concurrent.futures.wait([self._pending])
        text, self._failure = self._failure, ''
        if text and self._manager is not None:
            kept = ', '.join(map(str, self._manager.all_steps())) or 'none'
            text += f'; checkpoints in {self._folder}: {kept}'
        return text

    def last_saved(self) -> int | None:
        """The newest checkpoint now, as process 0 knows it."""
        return self._manager.latest_step() if self._manager is not None else self.latest_step

    def pin(self, step: int | None) -> int | None:
        """Keeps the newest checkpoint up to this step whatever `keep` says; None: no longer.

        What is held already stays so. Gives the step, as process 0 knows it.
        """
        if self._manager is None:
            return None
        try:
            if step is not None:
                return self._pinned.pin(step, self._manager.all_steps())
            self._pinned.unpin()
        except storage.io_errors() as error:
            self._failure = f'step {step} cannot be pinned: {_reason(error)}'
        return None

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole state, of the structure and on the devices of `state`; once.

        Raises:
          UserError: it has other names or shapes.
        """
        assert self._start is not None
        found = checkpoint_reader.flatten(self._start.tree)
        wanted = checkpoint_reader.flatten(state)
        for name in sorted(found.keys() | wanted.keys()):
            has = found[name].shape if name in found else 'missing'
            wants = wanted[name].shape if name in wanted else 'not there'
            if has != wants:
                raise errors.UserError(
                    f'step {self._start.step} in {self._folder} does not fit the run: {name} is '
                    f'{has}, expected {wants}; give another --workdir'
                )
        leaves = [
            jax.make_array_from_process_local_data(x.sharding, found[name].astype(x.dtype))
            for name, x in wanted.items()
        ]
        self._start.tree.clear()  # of no more use on the host
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def wait(self) -> None:
        """Waits for the last save."""
        self._thread.shutdown()


def _cannot_write(workdir: str | epath.Path, error: Exception) -> str:
    why, hint = storage.reason(error), storage.write_hint(workdir)
    return f'workdir {workdir} cannot be written: {why}; {hint}'


def _reason(error: Exception) -> str:
    """In a few words; libraries wrap what the system says in paths and types."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return errors.reason(error)
