"""Paths as users write them, names of files for messages, and the folders of caches and files."""

import fnmatch
import functools
import glob
import os
import pathlib
import stat
import tempfile

from simsiam_jax import errors, patience


def expand(path: str | os.PathLike[str]) -> str:
    """Returns the path with the home folder for a leading ~ or ~USER, as shells replace it.

    Shells leave the ~ of --NAME=~/FOLDER as it is. URLs are returned unchanged.

    Raises:
      UserError: There is no such user, or no home folder.
    """
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith('~'):
        name = expanded.partition('/')[0]
        raise errors.UserError(
            f'{path} begins with {name}; expected a home folder, and there is none. Write the '
            f'path in full, or ./{name} for a folder of this name'
        )
    return expanded


def printable(name: str) -> str:
    """Returns the name for messages and files: bytes that are not UTF-8 become \\xNN.

    Python reads such bytes of file names as lone surrogates, which cannot be written.
    """
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def mode(path: str) -> int:
    """Returns the type of a file or folder as os.stat, 0 if it does not exist.

    os.path.exists, isfile and isdir take a disk that is away for a missing file.

    Raises:
      OSError: The disk is away.
    """
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError) as error:  # no path may contain a NUL
        if patience.outage(error):
            raise
        return 0


def is_file(path: str) -> bool:
    """Returns whether the path is a file; raises OSError if the disk is away."""
    return stat.S_ISREG(mode(path))


def is_folder(path: str) -> bool:
    """Returns whether the path is a folder; raises OSError if the disk is away."""
    return stat.S_ISDIR(mode(path))


def matching(pattern: str) -> list[str]:
    """Returns the paths that match a pattern of shells, sorted.

    glob.glob leaves out what it cannot read, also if the disk is away.

    Raises:
      OSError: The disk is away.
    """
    head, name = os.path.split(pattern)
    folders = matching(head) if glob.has_magic(head) else [head]
    if not glob.has_magic(name):
        return [path for folder in folders if mode(path := os.path.join(folder, name))]
    hidden = name.startswith('.')
    return sorted(
        os.path.join(folder, entry)
        for folder in folders
        for entry in fnmatch.filter(_names(folder or '.'), name)
        if hidden or not entry.startswith('.')
    )


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if patience.outage(error):
            raise
        return []


def installed(name: str) -> pathlib.Path:
    """Returns the folder `configs` or `launch`: in the installed package, or in a checkout."""
    package = pathlib.Path(__file__).parent
    folder = package / name
    return folder if folder.is_dir() else package.parent / name


def cache_folder() -> pathlib.Path | None:
    """Returns simsiam_jax in $XDG_CACHE_HOME or ~/.cache; None if it cannot be written.

    Caches only save time: a warning is printed, and programs continue without them.
    """
    home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return _writable(os.path.join(os.path.expanduser(home), 'simsiam_jax'))


@functools.cache
def _writable(folder: str) -> pathlib.Path | None:
    try:
        if folder.startswith('~'):
            raise FileNotFoundError(0, 'this user has no home folder')
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # fails on a full disk
    except OSError as error:
        warn_without_cache(folder, error)
        return None
    return pathlib.Path(folder)


def warn_without_cache(path: str | os.PathLike[str], error: Exception) -> None:
    """Prints once that a cache cannot be used."""
    errors.warn_once(
        f'continuing without caches, because {path} cannot be used: {errors.reason(error)}. To '
        'start faster, set XDG_CACHE_HOME to a folder that can be written'
    )
