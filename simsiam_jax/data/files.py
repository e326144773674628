"""Image files from folders of any depth and from lists."""

import csv
import io
import os
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors, lazy_tf, patience
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import listing, remote_listing
from simsiam_jax.data.listing import EXTENSIONS


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
        return _read(self.paths[index]), self.labels[index]

    def name(self, index: int) -> str:
        return paths_lib.printable(self.paths[index])

    def names(self) -> list[str]:
        """Returns the paths, relative to the root."""
        root = os.path.join(self._root, '')
        return [path.removeprefix(root) for path in self.paths]

    def take(self, indices: Int[np.ndarray, 'n']) -> 'FileSource':
        """Returns the images at some indices, with all classes."""
        paths, labels = ([values[i] for i in indices] for values in (self.paths, self.labels))
        return FileSource(paths, labels, self.classes, self._root)


def list_folder(root: str, retry_seconds: int | float = patience.SECONDS) -> list[str]:
    """Returns the images below a folder or URL, sorted; see listing and remote_listing."""
    module = remote_listing if _remote(root) else listing
    return module.list_images(root, retry_seconds)


def open_folder(root: str, list_folder: Callable[[str], list[str]] = list_folder) -> FileSource:
    """Opens all images below `root`; two or more subfolders are the classes.

    Hidden files, hidden folders and folders of systems (listing.SYSTEM) are skipped, as are folders
    that may not be entered; a warning counts them. `root` may be remote (gs://...).

    Args:
      root: Folder or URL.
      list_folder: Function that lists the images below it.

    Raises:
      UserError: The folder is missing, unreadable or contains no images.
    """
    if not _remote(root):
        root = paths_lib.expand(root)
    try:
        paths = list_folder(root)
    except patience.ABSENT as error:
        raise errors.UserError(f'image folder {root} does not exist or is not a folder') from error
    except OSError as error:
        raise errors.UserError(f'image folder {root} cannot be read: {error}') from error
    if not paths:
        raise errors.UserError(
            f'image folder {root} contains no images; expected {", ".join(EXTENSIONS)} at any depth'
        )
    below = len(os.path.join(root, ''))
    tops = [path[below:].rpartition(os.sep)[0].partition(os.sep)[0] for path in paths]
    # A single subfolder is no class, and images next to the subfolders belong to no class.
    labeled = len(set(tops)) > 1 and '' not in tops
    return _labeled(paths, tops if labeled else None, root)


def open_list(path: str) -> FileSource:
    """Opens the images of a list: one path per line, or path[,label] if the list is a .csv file.

    The first line of a .csv file may name the columns.

    Paths are relative to the list's folder.

    Raises:
      UserError: The list is missing, empty or malformed.
    """
    path = paths_lib.expand(path)
    if not _remote(path) and not os.path.isfile(path):
        raise errors.UserError(f'list of images {path} does not exist or is not a file')
    try:
        text = _read(path).decode('utf-8', 'surrogateescape')  # as Python reads names of files
    except OSError as error:
        raise errors.UserError(f'list of images {path} cannot be read: {error}') from error
    if '\0' in text:
        raise errors.UserError(f'list of images {path} is not text; expected one path per line')
    rows = [[line.strip()] for line in text.splitlines()]
    if path.endswith('.csv'):
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text))]
        rows = rows[_has_header(rows) :]
    rows = [row for row in rows if row and row[0]]
    if not rows:
        raise errors.UserError(f'list of images {path} is empty; expected one path per line')
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width or width > 2:
            raise errors.UserError(
                f'list of images {path}: image {number} has {len(row)} fields; expected path or '
                'path,label, the same in all lines'
            )
    folder = os.path.dirname(path)
    paths = [row[0] if _remote(row[0]) else os.path.join(folder, row[0]) for row in rows]
    return _labeled(paths, [row[1] for row in rows] if width == 2 else None, folder)


def _has_header(rows: list[list[str]]) -> bool:
    """Returns whether the first row names columns: only the rows after it are images."""
    first, second = ((row or [''])[0].lower() for row in [*rows, [], []][:2])
    return first == 'path' or (not first.endswith(EXTENSIONS) and second.endswith(EXTENSIONS))


def _labeled(paths: list[str], names: list[str] | None, root: str) -> FileSource:
    if names is None:
        return FileSource(paths, [-1] * len(paths), (), root)
    found = sorted(set(names))
    number = {name: i for i, name in enumerate(found)}
    classes = tuple(map(paths_lib.printable, found))
    return FileSource(paths, [number[name] for name in names], classes, root)


def _remote(path: str) -> bool:
    return '://' in path


def _read(path: str) -> bytes:
    if not _remote(path):
        return pathlib.Path(path).read_bytes()
    tf = lazy_tf.load()
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            return file.read()
    except tf.errors.OpError as error:
        raise OSError(error.message) from error
