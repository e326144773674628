"""Image files in folders of any depth."""

import os
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors, lazy_tf, patience
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import class_names, image_files, listing, remote_listing
from simsiam_jax.data.patterns import ALL, Patterns

_WILDCARD = re.compile(r'[*?[]')


class FileSource:
    """Image files, each with a label or -1.

    Args:
      paths: Paths of the images.
      labels: Label of each image, -1 without labels.
      classes: Names of the classes; empty without labels.
      root: Folder of the set, '' if there is none.
    """

    def __init__(
        self, paths: list[str], labels: list[int], classes: tuple[str, ...], root: str = ''
    ):
        self.paths, self.labels, self.classes, self._root = paths, labels, classes, root

    @property
    def identity(self) -> str:
        """Returns the paths, relative to the root."""
        return '\0'.join(self.names())

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[bytes, int]:
        return read_file(self.paths[index]), self.labels[index]

    def name(self, index: int) -> str:
        return paths_lib.printable(self.paths[index])

    def names(self) -> list[str]:
        """Returns the paths, relative to the root."""
        return _names(self.paths, self._root)

    def take(self, indices: Int[np.ndarray, 'n']) -> 'FileSource':
        """Returns the images at some indices, with all classes."""
        paths, labels = ([values[i] for i in indices] for values in (self.paths, self.labels))
        return FileSource(paths, labels, self.classes, self._root)


def list_folder(root: str, retry_seconds: int | float = patience.SECONDS) -> list[str]:
    """Returns the images below a folder or URL, sorted; see listing and remote_listing."""
    module = remote_listing if is_remote(root) else listing
    return module.list_images(root, retry_seconds)


def open_folder(
    root: str, patterns: Patterns = ALL, list_folder: Callable[[str], list[str]] = list_folder
) -> FileSource:
    """Opens all images below `root`; two or more subfolders are the classes.

    Hidden files, hidden folders and folders of systems (listing.SYSTEM) are skipped, as are folders
    that may not be entered and files that are no images; warnings count them. `root` may be remote
    (gs://...).

    `root` may have the wildcards of shells, such as ``/data/*/images``. Then the subfolders of all
    these folders are the classes; if these folders have none, what the wildcards match.

    Args:
      root: Folder or URL.
      patterns: Images to use. If they leave only images in one subfolder, its subfolders are the
        classes.
      list_folder: Function that lists the images below a folder or URL.

    Raises:
      UserError: The folder is missing, unreadable or contains no images.
    """
    root = paths_lib.expand(root)
    folders = _folders(root)
    found = [
        (path, len(os.path.join(folder, '')))
        for folder in folders
        for path in _listed(folder, list_folder)
    ]
    if not found:
        raise errors.UserError(
            f'image folder {root} contains no images; expected '
            f'{", ".join(image_files.EXTENSIONS)} at any depth'
        )
    matched = folders != [root]
    base = os.path.dirname(_WILDCARD.split(root)[0]) if matched else root
    names = _names([path for path, _ in found], base)
    if patterns:
        chosen = patterns.select(names, root)
        found, names = [found[i] for i in chosen], [names[i] for i in chosen]
    inner = [path[below:] for path, below in found]
    if matched and not any('/' in name for name in inner):
        labels = class_names.by_folder(names, base, descend=True)
    else:
        labels = class_names.by_folder(inner, root, descend=matched or bool(patterns))
    return FileSource([path for path, _ in found], *labels, base)


def _folders(root: str) -> list[str]:
    """Returns the folder, or those that match its wildcards."""
    if is_remote(root):
        return _remote_matches(root) if '*' in root else [root]
    if not _WILDCARD.search(root) or paths_lib.is_folder(root):
        return [root]
    if matches := list(filter(paths_lib.is_folder, paths_lib.matching(root))):
        return matches
    raise errors.UserError(f'no image folder matches {root}; expected at least one')


def _remote_matches(pattern: str) -> list[str]:
    tf = lazy_tf.load()
    try:
        matches = sorted(folder.rstrip('/') for folder in tf.io.gfile.glob(pattern))
    except tf.errors.OpError as error:
        raise errors.UserError(f'image folder {pattern} cannot be read: {error.message}') from error
    if not matches:
        raise errors.UserError(f'no image folder matches {pattern}; expected at least one')
    return matches


def _listed(root: str, list_folder: Callable[[str], list[str]]) -> list[str]:
    try:
        return list_folder(root)
    except patience.ABSENT as error:
        kind = image_files.extension(root).removeprefix('.')
        hint = f'. Use {kind}:{root}' if kind in ('zip', 'tar', 'parquet') else ''
        raise errors.UserError(
            f'image folder {root} does not exist or is not a folder{hint}'
        ) from error
    except OSError as error:
        raise errors.UserError(f'image folder {root} cannot be read: {error}') from error


def _names(paths: list[str], root: str) -> list[str]:
    """Returns the paths, relative to the root."""
    root = os.path.join(root, '')
    return [path.removeprefix(root) for path in paths]


def is_remote(path: str) -> bool:
    """Returns whether the path is a URL."""
    return '://' in path


def read_file(path: str) -> bytes:
    """Returns the content of a file, which may be remote.

    Raises:
      OSError: The file cannot be read.
    """
    if not is_remote(path):
        with open(path, 'rb', buffering=0) as file:  # half the time of pathlib, under the lock
            return file.readall()
    tf = lazy_tf.load()
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            return file.read()
    except tf.errors.OpError as error:
        raise OSError(error.message) from error
