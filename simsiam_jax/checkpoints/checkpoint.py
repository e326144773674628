"""Checkpoints of a run, saved with Orbax: the state, to resume from, and the encoder alone."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simsiam_jax import errors, migration, patience
from simsiam_jax._version import __version__
from simsiam_jax.checkpoints import checkpoint_reader, pinned_checkpoint, same_run, workdirs
from simsiam_jax.runtime import storage
from simsiam_jax.terminal import say
from simsiam_jax.training.step import TrainState


def encoder_variables(state: TrainState) -> dict[str, Any]:
    """Returns {'params', 'batch_stats'} of the backbone."""
    return {
        'params': state.params['backbone'],
        'batch_stats': state.batch_stats.get('backbone', {}),
    }


@contextlib.contextmanager
def open(
    workdir: str,
    config: Mapping[str, Any],
    *,
    max_to_keep: int,
    keep_period: int = 0,
    images: Mapping[str, Any] | None = None,
    names: Callable[[], list[str]] = list,
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
      names: Returns the names of the training images, to name those that change later.
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
            workdirs.lock(folder, stack)
            what = f'the workdir {folder}'
            newest = _load_newest(folder)
            changed = newest is None or same_run.images_changed(given, newest.run)
            if newest is not None and newest.step:  # any run may start from converted weights
                differing = ''
                if changed:
                    compare = functools.partial(workdirs.differing_names, folder, names())
                    differing = patience.call(compare, what)
                if problem := same_run.refusal(
                    folder, given, newest.run, free=free, place=place, names=differing
                ):
                    raise errors.UserError(problem)
                for note in same_run.notes(given, newest.run, place=place):
                    say(note)
            manager = None
            if jax.process_index() == 0:
                keep = functools.partial(workdirs.write_names, folder, names, again=changed)
                patience.call(keep, what)
                for damaged in newest.damaged if newest else ():
                    patience.call(functools.partial(workdirs.move_damaged, folder, damaged), what)
                patience.call(lambda: workdirs.write_config(folder, given.config), what)
                manager = patience.call(
                    lambda: pinned_checkpoint.open_manager(folder, max_to_keep, keep_period), what
                )
                stack.callback(manager.close)
        except patience.io_errors() as error:
            raise errors.UserError(workdirs.cannot_write(workdir, error)) from error
        checkpoints = Checkpoints(folder, given, newest, manager)
        stack.callback(checkpoints.wait)  # runs first: the manager must close after the last save
        yield checkpoints


def _load_newest(folder: epath.Path) -> checkpoint_reader.CheckpointItem | None:
    """Returns the newest state that is not damaged; None if there are no checkpoints."""
    if not checkpoint_reader.list_steps(folder / checkpoint_reader.FOLDER):
        return None
    return checkpoint_reader.load(folder, 'state')


class Checkpoints:
    """The checkpoints of a run, WORKDIR/checkpoints/STEP/{state,encoder,meta}; use open().

    Process 0 writes them from a copy of the state on the host, while training continues.

    Args:
      folder: Workdir of the run.
      run: Configuration and images of the run, stored with each checkpoint.
      newest: Checkpoint to start from; None starts at step 0.
      manager: Orbax's manager; None in all processes but process 0.

    Attributes:
      storage_failed: Whether the last failure was one of the storage that may pass.
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
        self._failure, self.storage_failed = '', False

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
        """Writes a checkpoint and its checksums, again if the storage fails for a moment.

        A failure is kept for failure().
        """
        items = {'state': vars(state), 'encoder': encoder_variables(state)}
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
        size = sum(x.nbytes for x in jax.tree.leaves(items))
        try:
            patience.call(
                functools.partial(self._attempt, step, args, size),
                f'the workdir {self._folder}',
                lambda error: not (patience.is_forbidden(error) or _lasting(error)),
            )
        except Exception as error:  # its type depends on what failed
            self.storage_failed = isinstance(error, errors.TemporaryError)
            self._failure = f'step {step} cannot be saved: {_reason(error)}'

    def _attempt(self, step: int, args: ocp.args.Composite, size: int) -> None:
        """Writes a checkpoint, unless an earlier attempt has; leaves no part of it."""
        assert self._manager is not None
        if step in self._manager.all_steps():
            return
        if not storage.is_remote(self._folder) and shutil.disk_usage(self._folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception:  # its type depends on what failed
            for partial in (self._folder / checkpoint_reader.FOLDER).glob(f'{step}.*'):
                partial.rmtree()  # the disk may be full
            self._manager.reload()
            raise

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


def _reason(error: Exception) -> str:
    """Returns a short reason, without the paths and types that libraries wrap it in."""
    return _lasting(error) or errors.reason(error)


def _lasting(error: Exception) -> str:
    """Returns the reason if it is one that waiting does not cure, else ''."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    return next((text for text in map(os.strerror, numbers) if text in str(error)), '')
