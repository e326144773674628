"""Checkpoints by Orbax: the whole state for resuming, the encoder alone for everybody else."""

import concurrent.futures
import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from simsiam_jax import errors
from simsiam_jax.runtime import storage, distributed
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.checkpoints.pinned_checkpoint import Held
from simsiam_jax.runtime.lock import Lock
from simsiam_jax.training.step import TrainState

# Where a damaged checkpoint is put when training goes on from the one before.
DAMAGED = 'damaged'

# Parts of a configuration that do not change what is learnt: a run may go on with others.
FREE = (
    *('dry_run', 'guard', 'eval', 'checkpoint', 'log', 'profile', 'debug_nans'),
    *('model.remat', 'model.kernels'),
)


def encoder_variables(state: TrainState) -> dict[str, Any]:
    """The backbone's {'params', 'batch_stats'}."""
    return {
        'params': state.params['backbone'],
        'batch_stats': state.batch_stats['backbone'],
    }


class Checkpoints:
    """The checkpoints of a run: WORKDIR/checkpoints/STEP/{state,encoder,meta}.

    Process 0 writes them, from a copy of the state on the host, while training goes on; close()
    waits for that. The configuration is kept beside them, in WORKDIR/config.json, and
    WORKDIR/lock.json keeps other runs away until close().

    Args:
      config: of the run.
      keep: so many of the latest are kept.
      keep_every: besides, those at multiples of so many steps; 0: none.
      free: keys and sections of the configuration with which a run may go on changed.

    Raises:
      UserError: the workdir cannot be written, is in use, holds checkpoints of another
        configuration, or damaged ones only.
    """

    def __init__(
        self,
        workdir: str,
        config: Mapping[str, Any],
        *,
        keep: int,
        keep_every: int = 0,
        free: Sequence[str] = FREE,
    ):
        self._config = json.loads(json.dumps(config))  # as it comes back from a file
        self._folder = storage.folder(workdir)
        self._held = Held(self._folder / 'held.json')
        self._lock: Lock | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[Any] = self._thread.submit(int)
        self._failure = problem = ''
        if jax.process_index() == 0:
            try:
                storage.need_client(self._folder)
                self._lock = Lock(self._folder)
                (self._folder / checkpoint_reader.FOLDER).mkdir(exist_ok=True)
            except errors.UserError as error:
                problem = str(error)
            except storage.failures() as error:
                problem = _cannot_write(workdir, error)
        if problem := distributed.from_first(problem):
            self._release()
            raise errors.UserError(problem)
        try:
            self._start = self._newest(free)
            if jax.process_index() == 0:
                self._manager = self._open(keep, keep_every)
        except storage.failures() as error:
            self._release()
            raise errors.UserError(_cannot_write(workdir, error)) from error
        except errors.UserError:
            self._release()
            raise

    def _newest(self, free: Sequence[str]) -> checkpoint_reader.Saved | None:
        """The newest whole checkpoint; those damaged go aside, for training will come to them."""
        folder = self._folder / checkpoint_reader.FOLDER
        if not checkpoint_reader.list_steps(folder):
            return None
        newest = checkpoint_reader.load(self._folder, 'state')
        # At step 0 nothing is learnt yet: any configuration may go on from there.
        changed = changed_keys(self._config, newest.config, free) if newest.step else []
        if changed:
            raise errors.UserError(
                f'{self._folder} holds a run of another configuration: {", ".join(changed)}; '
                'take these back or give another --workdir'
            )
        if jax.process_index() == 0:
            for step in newest.damaged:
                aside = self._folder / DAMAGED / str(step)
                aside.parent.mkdir(exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (folder / str(step)).rename(aside)
        return newest

    def _open(self, keep: int, keep_every: int) -> ocp.CheckpointManager:
        partial = self._folder / 'config.json.partial'
        partial.write_text(json.dumps(self._config, indent=2) + '\n')
        partial.replace(self._folder / 'config.json')
        for left in (self._folder / checkpoint_reader.FOLDER).glob('*.orbax-checkpoint-tmp*'):
            left.rmtree()  # of a save that was killed
        # By process 0 alone: what every process holds needs no more, nor any waiting for others.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix='checkpoints'
        )
        policies = [preservation_policy.LatestN(keep), self._held]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            create=False,
            enable_async_checkpointing=False,  # save() has a thread of its own
            multiprocessing_options=alone,
        )
        return ocp.CheckpointManager(self._folder / checkpoint_reader.FOLDER, options=options)

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
                'step': step,
                'config': self._config,
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

    def hold(self, step: int | None) -> int | None:
        """Keeps the newest checkpoint up to this step whatever `keep` says; None: no longer.

        What is held already stays so. Gives the step, as process 0 knows it.
        """
        if self._manager is None:
            return None
        try:
            if step is not None:
                return self._held.hold(step, self._manager.all_steps())
            self._held.release()
        except storage.failures() as error:
            self._failure = f'step {step} cannot be held: {_reason(error)}'
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

    def close(self) -> None:
        self._thread.shutdown()
        if self._manager is not None:
            self._manager.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _cannot_write(workdir: str, error: Exception) -> str:
    return f'workdir {workdir} cannot be written: {storage.reason(error)}; {storage.mend(workdir)}'


def _reason(error: Exception) -> str:
    """In a few words; libraries wrap what the system says in paths and types."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return errors.reason(error)


def changed_keys(
    given: Mapping[str, Any], kept: Mapping[str, Any], free: Sequence[str], prefix: str = ''
) -> list[str]:
    """Names, old and new values of the keys that differ, free ones aside.

    Of a section with another `name`, as a method's, that alone: the rest has another meaning.
    """
    differences = []
    keys = sorted(set(given) | set(kept))
    if given.get('name') != kept.get('name'):
        keys = ['name']
    for key in keys:
        new, old = given.get(key), kept.get(key)
        if new == old or prefix + key in free:
            continue
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            differences += changed_keys(new, old, free, f'{prefix}{key}.')
        else:
            differences.append(f'{prefix}{key} ({old!r} -> {new!r})')
    return differences
