"""Checkpoints of a run, saved with Orbax: the state, to resume from, and the encoder alone."""

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

from simsiam_jax import errors, migration, patience
from simsiam_jax._version import __version__
from simsiam_jax.checkpoints import checkpoint_reader, pinned_checkpoint, same_run
from simsiam_jax.runtime import distributed, storage
from simsiam_jax.runtime.lock import Lock
from simsiam_jax.terminal import say
from simsiam_jax.training.step import TrainState

# Folder of a workdir for damaged checkpoints.
DAMAGED = 'damaged'


def encoder_variables(state: TrainState) -> dict[str, Any]:
    """Returns {'params', 'batch_stats'} of the backbone."""
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
    """Opens the checkpoints of a run and locks the workdir until the context ends.

    Loads the newest checkpoint that is not damaged. Moves newer, damaged ones to WORKDIR/damaged,
    because training saves these steps again.

    Args:
      workdir: Folder of the run, created if it is missing.
      config: Configuration of the run, stored in WORKDIR/config.json and in each checkpoint.
      max_to_keep: Number of latest checkpoints to keep.
      keep_period: Also keeps checkpoints at multiples of this number of steps; 0 disables it.
      images: Number and digest of the training images, as sources.fingerprint returns them.
      free: Keys and sections of the configuration that may differ from the checkpoint's.
      place: Keys that may differ if `images` do not.

    Yields:
      The checkpoints, in every process.

    Raises:
      UserError: The workdir cannot be written or is in use, its run has a different
        configuration, or all its checkpoints are damaged.
    """
    given = same_run.RunIdentity(migration.complete(config), dict(images or {}))
    folder = storage.folder(workdir)
    with contextlib.ExitStack() as stack:
        try:
            _lock(folder, stack)
            newest = _load_newest(folder)
            if newest is not None and newest.step:  # any run may start from converted weights
                if problem := same_run.refusal(folder, given, newest.run, free=free, place=place):
                    raise errors.UserError(problem)
                for note in same_run.notes(given, newest.run, place=place):
                    say(note)
            manager = None
            if jax.process_index() == 0:
                _move_damaged(folder, newest)
                _write_config(folder, given.config)
                manager = pinned_checkpoint.open_manager(folder, max_to_keep, keep_period)
                stack.callback(manager.close)
        except patience.io_errors() as error:
            raise errors.UserError(_cannot_write(workdir, error)) from error
        checkpoints = Checkpoints(folder, given, newest, manager)
        stack.callback(checkpoints.wait)  # runs first: the manager must close after the last save
        yield checkpoints


def _lock(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    """Creates the workdir and locks it until the stack closes, in process 0.

    Raises:
      UserError: The workdir cannot be locked; all processes raise it.
    """
    problem = ''
    if jax.process_index() == 0:
        try:
            storage.require_client(folder)
            stack.callback(Lock(folder).release)
            (folder / checkpoint_reader.FOLDER).mkdir(exist_ok=True)
        except errors.UserError as error:
            problem = str(error)
        except patience.io_errors() as error:
            problem = _cannot_write(folder, error)
    if problem := distributed.broadcast_from_process_0(problem):
        raise errors.UserError(problem)


def _load_newest(folder: epath.Path) -> checkpoint_reader.CheckpointItem | None:
    """Returns the newest state that is not damaged; None if there are no checkpoints."""
    if not checkpoint_reader.list_steps(folder / checkpoint_reader.FOLDER):
        return None
    return checkpoint_reader.load(folder, 'state')


def _move_damaged(folder: epath.Path, newest: checkpoint_reader.CheckpointItem | None) -> None:
    """Moves the damaged checkpoints that are newer than `newest` to WORKDIR/damaged."""
    for step in newest.damaged if newest else ():
        target = folder / DAMAGED / str(step)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rmtree()
        (folder / checkpoint_reader.FOLDER / str(step)).rename(target)


def _write_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes WORKDIR/config.json; a crash leaves the old file or the new one."""
    stamp = {'format': migration.FORMAT, 'version': __version__}
    partial = folder / 'config.json.partial'
    partial.write_text(json.dumps(stamp | dict(config), indent=2) + '\n')
    partial.replace(folder / 'config.json')


class Checkpoints:
    """The checkpoints of a run, WORKDIR/checkpoints/STEP/{state,encoder,meta}; use open().

    Process 0 writes them from a copy of the state on the host, while training continues.

    Args:
      folder: Workdir of the run.
      run: Configuration and images of the run, stored with each checkpoint.
      newest: Checkpoint to start from; None starts at step 0.
      manager: Orbax's manager; None in all processes but process 0.
    """

    def __init__(
        self,
        folder: epath.Path,
        run: same_run.RunIdentity,
        newest: checkpoint_reader.CheckpointItem | None,
        manager: ocp.CheckpointManager | None,
    ):
        self._folder, self._run, self._start, self._manager = folder, run, newest, manager
        self._pinned = pinned_checkpoint.PinnedStep(folder / pinned_checkpoint.FILE)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[Any] = self._thread.submit(int)  # no save yet
        self._failure = ''

    @property
    def start_step(self) -> int | None:
        """Step that the run starts from: None without a checkpoint, 0 for converted weights."""
        return self._start.step if self._start else None

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless that checkpoint exists.

        Returns when the state is copied to the host. A thread writes it; see failure().
        """
        step = int(state.step)
        if self._manager is None:
            return
        concurrent.futures.wait([self._pending])  # one copy at a time
        if step not in self._manager.all_steps():
            # Copied because device_get returns the devices' own buffers on a CPU.
            host = jax.tree.map(np.array, jax.device_get(state))
            self._pending = self._thread.submit(self._write, step, host)

    def _write(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint and its checksums; a failure is kept for failure()."""
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
        except Exception as error:  # its type depends on what failed
            self._failure = f'step {step} cannot be saved: {_reason(error)}'
            for partial in (self._folder / checkpoint_reader.FOLDER).glob(f'{step}.*'):
                partial.rmtree()  # the disk may be full
            self._manager.reload()

    def failure(self, *, wait: bool = False) -> str:
        """Returns why the last save failed, and the checkpoints that exist; '' if it did not.

        A failure is returned once.

        Args:
          wait: Waits for the last save to end.
        """
        if wait:
            concurrent.futures.wait([self._pending])
        text, self._failure = self._failure, ''
        if text and self._manager is not None:
            kept = ', '.join(map(str, self._manager.all_steps())) or 'none'
            text += f'; checkpoints in {self._folder}: {kept}'
        return text

    def last_saved(self) -> int | None:
        """Returns the newest checkpoint that exists now, in process 0."""
        return self._manager.latest_step() if self._manager is not None else self.start_step

    def pin(self, step: int | None) -> int | None:
        """Pins the newest checkpoint up to a step, so that it is kept beyond max_to_keep.

        If a checkpoint is pinned already, it stays the pinned one.

        Args:
          step: Last step that may be pinned; None unpins.

        Returns:
          The pinned step, in process 0; None if there is none.
        """
        if self._manager is None:
            return None
        try:
            if step is not None:
                return self._pinned.pin(step, self._manager.all_steps())
            self._pinned.unpin()
        except patience.io_errors() as error:
            self._failure = f'{pinned_checkpoint.FILE} cannot be written: {_reason(error)}'
        return None

    def restore(self, state: TrainState) -> TrainState:
        """Returns the loaded state on the devices of `state`. Call it once.

        Args:
          state: State of the run, with the expected names and shapes.

        Raises:
          UserError: The loaded state has different names or shapes.
        """
        assert self._start is not None
        stored = checkpoint_reader.flatten(self._start.tree)
        expected = checkpoint_reader.flatten(state)
        for name in sorted(stored.keys() | expected.keys()):
            has = stored[name].shape if name in stored else 'missing'
            wants = expected[name].shape if name in expected else 'none'
            if has != wants:
                raise errors.UserError(
                    f'step {self._start.step} in {self._folder} does not fit the run: {name} is '
                    f'{has}, expected {wants}. Use a new --workdir'
                )
        leaves = [
            jax.make_array_from_process_local_data(x.sharding, stored[name].astype(x.dtype))
            for name, x in expected.items()
        ]
        self._start.tree.clear()  # frees memory of the host
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def wait(self) -> None:
        """Waits for the last save to end; no save can follow."""
        self._thread.shutdown()


def _cannot_write(workdir: str | epath.Path, error: Exception) -> str:
    reason, hint = storage.reason(error), storage.write_hint(workdir)
    return f'workdir {workdir} cannot be written: {reason}; {hint}'


def _reason(error: Exception) -> str:
    """Returns a short reason, without the paths and types that libraries wrap it in."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return errors.reason(error)
