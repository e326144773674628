"""Checkpoints by Orbax: the whole state for resuming, the encoder alone for everybody else."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from simsiam_jax import errors
from simsiam_jax.training.step import TrainState

FOLDER = 'checkpoints'

# Parts of a configuration that do not change what is learnt: a run may go on with others.
FREE = ('dry_run', 'eval', 'checkpoint', 'log')


def encoder_variables(state: TrainState) -> dict[str, Any]:
    """The backbone's {'params', 'batch_stats'}."""
    return {
        'params': state.params['backbone'],
        'batch_stats': state.batch_stats['backbone'],
    }


def find(
    workdir: str | os.PathLike[str], step: int | None = None
) -> tuple[epath.Path, dict[str, Any]]:
    """The folder of a run's checkpoint, None: the latest, and the configuration of the run.

    Raises:
      UserError: there is no such checkpoint.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        found = f'steps {", ".join(map(str, sorted(steps)))}' if steps else 'none'
        wanted = 'a checkpoint' if step is None else f'step {step}'
        raise errors.UserError(
            f'{wanted} was expected in {folder}, there is: {found}; give the workdir of a '
            'pre-training run or a file of weights'
        )
    item = folder / str(max(steps) if step is None else step)
    return item, json.loads((item / 'meta' / 'metadata').read_text())['config']


class Checkpoints:
    """The checkpoints of a run: WORKDIR/checkpoints/STEP/{state,encoder,meta}.

    Saving is asynchronous; close() waits for it. The configuration is kept beside them, in
    WORKDIR/config.json.

    Args:
      config: of the run.
      keep: so many of the latest are kept.
      free: keys and sections of the configuration with which a run may go on changed.

    Raises:
      UserError: the workdir cannot be written, or holds checkpoints of another configuration.
    """

    def __init__(
        self, workdir: str, config: Mapping[str, Any], *, keep: int, free: Sequence[str] = FREE
    ):
        self._config = json.loads(json.dumps(config))  # as it comes back from a file
        folder = epath.Path(workdir).absolute()
        try:
            self._manager = ocp.CheckpointManager(
                folder / FOLDER,
                options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            )
            path = folder / 'config.json'
            # At step 0 nothing is learnt yet: any configuration may go on from there.
            if self.latest_step and path.exists():
                changed = _changed(self._config, json.loads(path.read_text()), free)
                if changed:
                    raise errors.UserError(
                        f'{workdir} holds a run of another configuration: {", ".join(changed)}; '
                        'take these back or give another --workdir'
                    )
            if jax.process_index() == 0:
                path.write_text(json.dumps(self._config, indent=2) + '\n')
        except OSError as error:
            raise errors.UserError(
                f'workdir {workdir} cannot be written: {error.strerror}; give another --workdir'
            ) from error

    @property
    def latest_step(self) -> int | None:
        """None where there is no checkpoint; 0 where one holds weights to start from."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless it is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                encoder=ocp.args.StandardSave(encoder_variables(state)),
                meta=ocp.args.JsonSave({'step': step, 'config': self._config}),
            ),
            force=True,
        )

    def restore(self, state: TrainState) -> TrainState:
        """The latest state, of the shapes and on the devices of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest_step, args=args)['state']

    def preempted(self, step: int) -> bool:
        """Whether the scheduler of a multi-process run asked all processes to save now."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def close(self) -> None:
        self._manager.close()


def _changed(
    given: Mapping[str, Any], saved: Mapping[str, Any], free: Sequence[str], prefix: str = ''
) -> list[str]:
    """Names, old and new values of the keys that differ, free ones aside.

    Of a section with another `name`, as a method's, that alone: the rest has another meaning.
    """
    differences = []
    keys = sorted(set(given) | set(saved))
    if given.get('name') != saved.get('name'):
        keys = ['name']
    for key in keys:
        new, old = given.get(key), saved.get(key)
        if new == old or prefix + key in free:
            continue
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            differences += _changed(new, old, free, f'{prefix}{key}.')
        else:
            differences.append(f'{prefix}{key} ({old!r} -> {new!r})')
    return differences


class Sigterm:
    """Within this context SIGTERM sets `received` instead of ending the process."""

    received = False

    def __enter__(self) -> 'Sigterm':
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)
