"""Paths as users write them, and names of files for messages."""

import os

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
