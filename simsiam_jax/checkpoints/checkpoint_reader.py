"""What lies in a checkpoint, read only where its checksums say that it is as it was saved.

WORKDIR/checkpoints/STEP/ holds the items state and encoder, and meta: the step, the configuration
and the checksums of the items and of itself.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from simsiam_jax import errors, migration
from simsiam_jax.checkpoints.same_run import RunIdentity
from simsiam_jax.runtime import distributed, storage
from simsiam_jax.terminal import say

FOLDER = 'checkpoints'


@dataclasses.dataclass(frozen=True)
class CheckpointItem:
    """An item of a checkpoint: nested dicts of NumPy arrays.

    Attributes:
      run: Configuration with this version's keys, and images.
      damaged: Newer steps that could not be used.
    """

    step: int
    run: RunIdentity
    tree: dict[str, Any]
    damaged: tuple[int, ...] = ()


class _DamagedError(Exception):
    """Says what is wrong."""


def load(
    workdir: str | os.PathLike[str], item: str, *, step: int | None = None, keys: Sequence[str] = ()
) -> CheckpointItem:
    """An item of a run's checkpoint; of its parts `keys`, or all.

    Args:
      step: None: the newest that is whole; those that are not are named on the terminal.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    folder = storage.folder(workdir) / FOLDER
    with storage.reading(folder):
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
        meta: dict[str, Any] = {}
        tree: dict[str, Any] = {}
        try:
            meta, tree = _read(folder / str(tried), item, keys)
        # Damaged files raise nearly anything: Exception, ValueError, OSError, KeyError, ...
        except Exception as error:
            if storage.is_unreachable(error):
                raise storage.read_error(folder / str(tried), error) from error
            problem = errors.reason(error)
        if distributed.all_processes(not problem):
            run = _identity(meta, folder / str(tried))
            return CheckpointItem(tried, run, tree, tuple(damaged))
        damaged.append(tried)
        say(
            f'warning: step {tried} in {folder} is damaged and passed over: '
            f'{problem or "so says another process"}'
        )
    raise errors.UserError(
        f'damaged: step {", ".join(map(str, damaged))} in {folder}, and no other is there; bring '
        'back a copy, or move the folder away to begin again'
    )


def read_run(workdir: str | os.PathLike[str], step: int) -> RunIdentity:
    """Returns configuration and images of a checkpoint, without its arrays.

    Raises:
      UserError: The configuration is of a newer version.
      Exception: Of many types, if the metadata is damaged or cannot be read.
    """
    folder = storage.folder(workdir) / FOLDER / str(step)
    return _identity(_read_meta(folder), folder)


def load_item(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree of an item by its own path, WORKDIR/checkpoints/STEP/ITEM, or a copy of its step.

    Raises:
      UserError: it is damaged.
    """
    item = storage.folder(path)
    try:
        return _read(item.parent, item.name, ())[1]
    except Exception as error:  # as in load()
        if storage.is_unreachable(error):
            raise storage.read_error(item, error) from error
        raise errors.UserError(
            f'{item} is damaged: {errors.reason(error)}; take another step'
        ) from error


def list_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, as process 0 sees them."""
    folder = epath.Path(path)
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    return distributed.broadcast_from_process_0(steps)


def _identity(meta: dict[str, Any], origin: epath.Path) -> RunIdentity:
    config = meta['config'] | {key: meta[key] for key in ('format', 'version') if key in meta}
    return RunIdentity(migration.complete(config, origin=str(origin)), meta.get('images', {}))


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    if meta['seal'] != seal(meta):
        raise _DamagedError('its metadata are not as they were saved')
    return meta


def _read(
    folder: epath.Path, item: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns meta and the tree of an item; raises if they are not as they were saved."""
    meta = _read_meta(folder)
    wanted = {
        name: expected
        for name, expected in meta['items'][item].items()
        if not keys or name.split('/')[0] in keys
    }
    stores = {name: _open(folder / item, name) for name in wanted}
    # Before anything is read: a damaged shape may ask for more memory than there is.
    for name, (dtype, shape, _) in wanted.items():
        store = stores[name].result()
        if (store.dtype.name, list(store.shape)) != (dtype, shape):
            raise _DamagedError(f'{name} in {item} is {store.dtype.name}{list(store.shape)}')
    arrays = {name: store.result().read() for name, store in stores.items()}
    found = {name: array.result() for name, array in arrays.items()}
    for name, array in found.items():
        if _entry(array) != wanted[name]:
            raise _DamagedError(f'the checksum of {name} in {item} is wrong')
    if not meta.get('format'):
        found = {migration.rename_array(name): array for name, array in found.items()}
    tree = flax.traverse_util.unflatten_dict(found, sep='/')
    return meta, {key: {} for key in keys} | tree


def _open(item: epath.Path, name: str) -> Any:
    """The future of an array as Orbax stores it.

    Not by Orbax: of several damaged arrays it reports one, and its threads print the others.
    """
    base = os.fspath(item) if storage.is_remote(item) else f'file://{item}'
    kvstore = {'driver': 'ocdbt', 'base': f'{base}/', 'path': name.replace('/', '.') + '/'}
    return ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, read=True)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as opt_state/0/trace/backbone/conv1/kernel."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(tree: Any) -> dict[str, Any]:
    """What meta keeps of an item: name -> type, shape and sha256 of every array."""
    return {name: _entry(array) for name, array in flatten(tree).items()}


def _entry(array: np.ndarray) -> list[Any]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), digest]


def seal(meta: dict[str, Any]) -> str:
    """A checksum of all of meta but the seal."""
    rest = {key: value for key, value in meta.items() if key != 'seal'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
