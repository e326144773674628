"""What lies in a checkpoint, read only where its checksums say that it is as it was saved.

WORKDIR/checkpoints/STEP/ holds the items state and encoder, and meta: the step, the configuration
and the checksums of the items and of itself.
"""

import dataclasses
import gc
import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simsiam_jax import errors
from simsiam_jax.training import distributed, writers

FOLDER = 'checkpoints'


@dataclasses.dataclass(frozen=True)
class Saved:
    """An item of a checkpoint: nested dicts and lists of NumPy arrays.

    Attributes:
      config: of the run.
      damaged: newer steps that could not be used.
    """

    step: int
    config: dict[str, Any]
    tree: dict[str, Any]
    damaged: tuple[int, ...] = ()


class _DamagedError(Exception):
    """Says what is wrong."""


def load(
    workdir: str | os.PathLike[str], item: str, *, step: int | None = None, keys: Sequence[str] = ()
) -> Saved:
    """An item of a run's checkpoint; of its parts `keys`, or all.

    Args:
      step: None: the newest that is whole; those that are not are named on the terminal.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    steps = list_steps(folder)
    if not steps or (step is not None and step not in steps):
        found = f'steps {", ".join(map(str, steps))}' if steps else 'none'
        wanted = 'a checkpoint' if step is None else f'step {step}'
        raise errors.UserError(
            f'{wanted} was expected in {folder}, there is: {found}; give the workdir of a '
            'pre-training run'
        )
    damaged: list[int] = []
    for tried in [step] if step is not None else reversed(steps):
        problem = ''
        config: dict[str, Any] = {}
        tree: dict[str, Any] = {}
        with errors.quiet():  # of many damaged arrays one raises, the others print
            try:
                config, tree = _read(folder / str(tried), item, keys)
            # Damaged files raise nearly anything: Exception, ValueError, OSError, KeyError, ...
            except Exception as error:
                problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                time.sleep(0.5)
                gc.collect()
        if distributed.all_agree(not problem):
            return Saved(tried, config, tree, tuple(damaged))
        damaged.append(tried)
        writers.say(
            f'warning: step {tried} in {folder} is damaged and passed over: '
            f'{problem or "so says another process"}'
        )
    raise errors.UserError(
        f'damaged: step {", ".join(map(str, damaged))} in {folder}, and no other is there; bring '
        'back a copy, or move the folder away to begin again'
    )


def list_steps(folder: epath.Path) -> list[int]:
    """Steps of the checkpoints in the folder, ascending, as process 0 sees them."""
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    return distributed.from_first(steps)


def _read(
    folder: epath.Path, item: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the tree of an item; raises where they are not as they were saved."""
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    if meta['seal'] != seal(meta):
        raise _DamagedError('its metadata are not as they were saved')
    expected = meta['items'][item]
    described = ocp.PyTreeCheckpointHandler().metadata(folder / item).tree
    # First: a damaged shape may ask for more memory than there is.
    if layout(described) != expected['layout']:
        raise _DamagedError(f'names, shapes or types in {item} are not as they were saved')
    keys = keys or list(described)
    tree = read_arrays(folder / item, {key: described[key] for key in keys})
    for key in keys:
        if checksum(tree[key]) != expected['parts'][key]:
            raise _DamagedError(f'the checksum of {key} in {item} is wrong')
    return meta['config'], tree


def read_arrays(item: epath.Path, described: dict[str, Any]) -> dict[str, Any]:
    """NumPy arrays of these parts of an item's metadata."""
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), described)
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True)
    # Each process reads for itself: none waits for another that found a damaged file.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f'process{jax.process_index()}',
    )
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as checkpointer:
        return checkpointer.restore(item, args=args)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as opt_state/0/trace/backbone/conv1/kernel."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(tree: dict[str, Any]) -> dict[str, Any]:
    """What meta keeps of an item: checksums of its layout and of the bytes of each part."""
    return {'layout': layout(tree), 'parts': {key: checksum(part) for key, part in tree.items()}}


def layout(tree: Any) -> str:
    """A checksum of the names, types and shapes; of arrays or of what describes them."""
    rows = [f'{name} {x.dtype} {list(x.shape)}' for name, x in sorted(flatten(tree).items())]
    return hashlib.sha256('\n'.join(rows).encode()).hexdigest()


def checksum(tree: Any) -> str:
    """sha256 of the bytes of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for _, array in sorted(flatten(tree).items()):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def seal(meta: dict[str, Any]) -> str:
    """A checksum of all of meta but the seal."""
    rest = {key: value for key, value in meta.items() if key != 'seal'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
