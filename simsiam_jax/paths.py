"""Paths as users write them, names of files for messages, and the folders of caches and files."""

import functools
import os
import pathlib
import tempfile

from simsiam_jax import errors


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
