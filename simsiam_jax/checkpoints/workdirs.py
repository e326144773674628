"""Prepares the workdir of a run: its lock, its configuration, its damaged checkpoints."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from simsiam_jax import errors, migration, paths, patience
from simsiam_jax._version import __version__
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.runtime import distributed, storage
from simsiam_jax.runtime.lock import Lock

# Folder of a workdir for damaged checkpoints, and file of the names of the training images.
DAMAGED = 'damaged'
NAMES = 'images.json.gz'


def lock(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    """Creates the workdir and locks it until the stack closes, in process 0.

    Raises:
      UserError: The workdir cannot be locked; all processes raise it.
    """

    def create() -> None:
        try:
            storage.require_client(folder)
            what = f'the workdir {folder}'
            stack.callback(patience.call(lambda: Lock(folder), what).release)
            checkpoints = folder / checkpoint_reader.FOLDER
            patience.call(lambda: checkpoints.mkdir(exist_ok=True), what)
        except patience.io_errors() as error:
            raise errors.UserError(cannot_write(folder, error)) from error

    distributed.from_process_0(create)


def move_damaged(folder: epath.Path, step: int) -> None:
    """Moves a damaged checkpoint to WORKDIR/damaged."""
    target = folder / DAMAGED / str(step)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        target.rmtree()
    (folder / checkpoint_reader.FOLDER / str(step)).rename(target)


def write_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes WORKDIR/config.json; a crash leaves the old file or the new one."""
    stamp = {'format': migration.FORMAT, 'version': __version__}
    _replace(folder / 'config.json', (json.dumps(stamp | dict(config), indent=2) + '\n').encode())


def write_names(folder: epath.Path, names: Callable[[], list[str]], *, again: bool) -> None:
    """Writes the names of the training images to WORKDIR/images.json.gz, if missing or `again`."""
    if (again or not (folder / NAMES).exists()) and (known := names()):
        _replace(folder / NAMES, gzip.compress(json.dumps(known).encode(), 1))


def differing_names(folder: epath.Path, names: Sequence[str]) -> str:
    """Returns text with the first images that were added or removed; '' if they are not known."""
    try:
        before = json.loads(gzip.decompress((folder / NAMES).read_bytes()))
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error, ValueError):
        return ''  # of an earlier version, or damaged: the digest has decided already
    lost, new = set(before).difference(names), set(names).difference(before)
    return '; '.join(
        f'{what}: {errors.first(map(paths.printable, some))}'
        for what, some in (('added', new), ('removed', lost))
        if some
    )


def _replace(file: epath.Path, content: bytes) -> None:
    partial = file.with_name(f'{file.name}.partial')
    partial.write_bytes(content)
    partial.replace(file)


def cannot_write(workdir: str | epath.Path, error: Exception) -> str:
    """Returns the message for a workdir that cannot be written."""
    reason, hint = storage.reason(error), storage.write_hint(workdir)
    return f'workdir {workdir} cannot be written: {reason}; {hint}'
