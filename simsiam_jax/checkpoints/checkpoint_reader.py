"""Reads checkpoints and verifies their checksums.

WORKDIR/checkpoints/STEP/ contains the items state and encoder, and meta: the step, the
configuration, and the checksums of the items and of meta itself.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from simsiam_jax import errors, migration, patience
from simsiam_jax.checkpoints.same_run import RunIdentity
from simsiam_jax.runtime import distributed, storage
from simsiam_jax.terminal import say

FOLDER = 'checkpoints'


@dataclasses.dataclass(frozen=True)
class CheckpointItem:
    """An item of a checkpoint.

    Attributes:
      step: Step of the checkpoint.
      run: Configuration, with this version's keys, and images of the run.
      tree: Nested dicts of NumPy arrays.
      damaged: Newer steps that are damaged.
    """

    step: int
    run: RunIdentity
    tree: dict[str, Any]
    damaged: tuple[int, ...] = ()


class _DamagedError(Exception):
    """A checkpoint differs from what was saved; the message says how."""


def load(
    workdir: str | os.PathLike[str], item: str, *, step: int | None = None, keys: Sequence[str] = ()
) -> CheckpointItem:
    """Loads an item of a run's checkpoint and verifies it.

    Args:
      workdir: Workdir of the run.
      item: 'state' or 'encoder'.
      step: Step of the checkpoint; None loads the newest that is not damaged, and prints a warning
        for each newer, damaged one.
      keys: Parts of the item to load, such as 'params'; () loads all.

    Raises:
      UserError: There is no such checkpoint, it cannot be read, or it is damaged.
      TemporaryError: The storage has failed for too long.
    """
    folder = storage.folder(workdir) / FOLDER
    with storage.reading(folder):
        steps = list_steps(folder)
    if not steps or (step is not None and step not in steps):
        expected = '' if step is None else f' for step {step}'
        found = f'steps {", ".join(map(str, steps))}' if steps else 'none'
        raise errors.UserError(
            f'no checkpoint{expected} in {folder} (found: {found}). Use the workdir of a '
            'pre-training run'
        )
    damaged: list[int] = []
    for candidate in [step] if step is not None else reversed(steps):
        problem = ''
        meta: dict[str, Any] = {}
        tree: dict[str, Any] = {}
        try:
            meta, tree = _read_patiently(folder / str(candidate), item, keys)
        except errors.UserError:  # a newer format is not damage
            raise
        # Damaged files raise nearly anything: Exception, ValueError, OSError, KeyError, ...
        except Exception as error:
            if patience.is_forbidden(error):
                raise storage.read_error(folder / str(candidate), error) from error
            problem = errors.reason(error)
        if distributed.all_processes(not problem):
            run = _identity(meta, folder / str(candidate))
            return CheckpointItem(candidate, run, tree, tuple(damaged))
        damaged.append(candidate)
        say(
            f'warning: step {candidate} in {folder} is damaged, skipping it: '
            f'{problem or "another process cannot read it"}'
        )
    if step is not None:
        raise errors.UserError(
            f'step {step} in {folder} is damaged. Restore a copy or use another step'
        )
    raise errors.UserError(
        f'all checkpoints in {folder} are damaged: step {", ".join(map(str, damaged))}. Restore a '
        'copy, or move the folder away to start over'
    )


def read_run(workdir: str | os.PathLike[str], step: int) -> RunIdentity:
    """Returns the configuration and images of a checkpoint, without loading its arrays.

    Args:
      workdir: Workdir of the run.
      step: Step of the checkpoint.

    Raises:
      UserError: The configuration is of a newer version.
      Exception: The metadata are damaged or cannot be read; the type depends on how.
    """
    folder = storage.folder(workdir) / FOLDER / str(step)
    return _identity(_read_meta(folder), folder)


def newest_run(workdir: str | os.PathLike[str]) -> RunIdentity | None:
    """Returns the run of the newest readable checkpoint after step 0; None if there is none."""
    folder = storage.folder(workdir) / FOLDER
    with storage.reading(folder):
        steps = list_steps(folder)
    for step in reversed([step for step in steps if step]):
        what = f'the checkpoint {folder / str(step)}'
        try:
            return patience.call(functools.partial(read_run, workdir, step), what)
        except errors.UserError:
            raise
        except Exception as error:  # damage, which load() reports
            logging.debug('%s: %s', what, errors.reason(error))
    return None


def load_item(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads an item by its path and verifies it.

    Args:
      path: WORKDIR/checkpoints/STEP/ITEM, or ITEM in a copy of the STEP folder.

    Raises:
      UserError: The item cannot be read, or it is damaged.
    """
    item = storage.folder(path)
    try:
        return _read_patiently(item.parent, item.name, ())[1]
    except errors.UserError:
        raise
    except Exception as error:  # as in load()
        if patience.is_forbidden(error):
            raise storage.read_error(item, error) from error
        raise errors.UserError(
            f'{item} is damaged: {errors.reason(error)}. Use another step'
        ) from error


def list_steps(path: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending, as process 0 lists them."""
    folder = epath.Path(path)
    return distributed.from_process_0(
        lambda: patience.call(lambda: _list_steps(folder), f'the folder {folder}')
    )


def _list_steps(folder: epath.Path) -> list[int]:
    try:
        if storage.is_remote(folder):
            steps = sorted(ocp.utils.checkpoint_steps(folder))
            if not steps:
                list(folder.glob('*'))  # raises the error that TensorFlow took for a missing folder
            return steps
        # Orbax leaves out a step if Path.is_dir() returns False, as for storage that is away.
        with os.scandir(folder) as entries:
            return sorted(int(e.name) for e in entries if e.name.isdecimal() and e.is_dir())
    except patience.ABSENT:
        return []


def _identity(meta: dict[str, Any], origin: epath.Path) -> RunIdentity:
    """Returns the run that saved a checkpoint, with this version's keys."""
    config = meta['config'] | {key: meta[key] for key in ('format', 'version') if key in meta}
    return RunIdentity(migration.complete(config, origin=str(origin)), meta.get('images', {}))


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    """Loads the metadata of a checkpoint and verifies them."""
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    if meta['seal'] != seal(meta):
        raise _DamagedError('the checksum of its metadata is wrong')
    migration.check_format(meta, str(folder))
    return meta


def _read_patiently(
    folder: epath.Path, item: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the result of _read, which is repeated after errors that may pass.

    Raises:
      TemporaryError: The errors did not pass.
      Exception: As _read.
    """
    return patience.call(
        lambda: _read(folder, item, keys),
        f'the checkpoint {folder}',
        # The folder was listed before: if it is missing as a whole, its storage is away.
        lambda error: patience.is_temporary(error) or not folder.is_dir(),
    )


def _read(
    folder: epath.Path, item: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the metadata and the tree of an item.

    Raises:
      Exception: An array or the metadata are damaged or cannot be read; the type depends on how.
    """
    meta = _read_meta(folder)
    expected = {
        name: entry
        for name, entry in meta['items'][item].items()
        if not keys or name.split('/')[0] in keys
    }
    stores = {name: _open_array(folder / item, name) for name in expected}
    # Checked before anything is read: a damaged shape may need more memory than there is.
    for name, (dtype, shape, _) in expected.items():
        store = stores[name].result()
        if (store.dtype.name, list(store.shape)) != (dtype, shape):
            raise _DamagedError(
                f'{name} in {item} is {store.dtype.name}{list(store.shape)}, '
                f'expected {dtype}{shape}'
            )
    reads = {name: store.result().read() for name, store in stores.items()}
    arrays = {name: read.result() for name, read in reads.items()}
    for name, array in arrays.items():
        if _entry(array) != expected[name]:
            raise _DamagedError(f'the checksum of {name} in {item} is wrong')
    if not meta.get('format'):
        arrays = {migration.rename_array(name): array for name, array in arrays.items()}
    tree = flax.traverse_util.unflatten_dict(arrays, sep='/')
    return meta, {key: {} for key in keys} | tree


def _open_array(item: epath.Path, name: str) -> Any:
    """Returns the future of an array that Orbax stored.

    Orbax is not used to read: if several arrays are damaged, it raises one error and its threads
    print the others.
    """
    base = os.fspath(item) if storage.is_remote(item) else f'file://{item}'
    kvstore = {'driver': 'ocdbt', 'base': f'{base}/', 'path': name.replace('/', '.') + '/'}
    return ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, read=True)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, such as opt_state/0/trace/backbone/conv1/kernel."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(tree: Any) -> dict[str, Any]:
    """Returns the entry of an item in meta: name -> type, shape and SHA-256 of every array."""
    return {name: _entry(array) for name, array in flatten(tree).items()}


def _entry(array: np.ndarray) -> list[Any]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), digest]


def seal(meta: dict[str, Any]) -> str:
    """Returns the checksum of meta, without its key `seal`."""
    rest = {key: value for key, value in meta.items() if key != 'seal'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
