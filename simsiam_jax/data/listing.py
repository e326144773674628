"""Lists the images below a folder, at any depth."""

import collections
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simsiam_jax import errors, patience, terminal
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import image_files

# Folders that systems create next to images: previews, deleted files, metadata. They are skipped,
# as hidden files and folders are.
SYSTEM = {
    '#recycle',
    '$recycle.bin',
    '@eadir',
    '__macosx',
    'lost+found',
    'system volume information',
    'thumbnails',
}

# Errors of a folder that may not be entered, and of links in a circle.
_CLOSED = (errno.EACCES, errno.EPERM, errno.ELOOP)

# Listings of at least this many images are cached.
LARGE = 10_000


@dataclasses.dataclass
class Walk:
    """What a walk through folders meets besides images.

    Attributes:
      kinds: Extensions of images.
      times: Time of the last change of each folder, nanoseconds.
      closed: Folders that may not be entered.
      hidden: Number of skipped folders by name, and of hidden images.
      skipped: Number of skipped files by extension.
    """

    kinds: frozenset[str] = dataclasses.field(default_factory=image_files.readable)
    times: dict[str, int] = dataclasses.field(default_factory=dict)
    closed: list[str] = dataclasses.field(default_factory=list)
    hidden: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def is_skipped_folder(self, name: str) -> bool:
        """Returns whether to skip the folder, and counts it if so."""
        skipped = is_system(name)
        self.hidden[name] += skipped
        return skipped

    def is_image(self, name: str, entry: os.DirEntry | None = None) -> bool:
        """Returns whether the file is an image that is not hidden; counts what is skipped.

        Args:
          name: Name of the file.
          entry: The file, which is opened if its name has no extension; None does not open it.
        """
        kind = image_files.extension(name)
        if name.startswith('.'):
            self.hidden['hidden images'] += kind in self.kinds
            return False
        if kind in self.kinds or (not kind and entry is not None and self._has_image(entry)):
            return True
        self.skipped[kind] += 1
        return False

    def _has_image(self, entry: os.DirEntry) -> bool:
        try:
            if not entry.is_file():  # opening a pipe would wait forever
                return False
            with open(entry.path, 'rb') as file:
                return image_files.begins_like_image(file.read(image_files.HEAD), self.kinds)
        except PermissionError:
            return False

    def _counts(self) -> list[str]:
        return sorted(f'{paths_lib.printable(name)} ({n})' for name, n in (+self.hidden).items())

    def warn(self, root: str, what: str = 'image folder') -> None:
        """Prints what was skipped."""
        if hidden := self._counts():
            more = f' and {len(hidden) - 8} more names' if len(hidden) > 8 else ''
            errors.warn_once(
                f'{what} {root}: skipped hidden or of the system: {", ".join(hidden[:8])}{more}'
            )
        if self.skipped:
            errors.warn_once(f'{what} {root}: skipped {image_files.describe_skipped(self.skipped)}')
        if self.closed:
            names = ', '.join(map(paths_lib.printable, self.closed[:3]))
            more = f' and {len(self.closed) - 3} more' if len(self.closed) > 3 else ''
            errors.warn_once(
                f'{what} {root}: skipped {len(self.closed)} that may not be entered '
                f'({names}{more}). If they contain images, give yourself access'
            )


def is_system(name: str) -> bool:
    """Returns whether a folder is hidden or made by a system."""
    return name.startswith('.') or name.lower() in SYSTEM


def list_images(root: str, retry_seconds: int | float = patience.SECONDS) -> list[str]:
    """Returns the images below a folder on a disk, sorted; waits if the disk fails for a moment.

    Raises:
      OSError: The folder is missing or cannot be read.
      TemporaryError: The disk has failed for longer than retry_seconds.
    """
    what = f'the image folder {root}'
    patience.call(lambda: os.scandir(root).close(), what, seconds=retry_seconds)
    return patience.call(
        lambda: _list_cached(root),
        what,
        patience.is_away,  # the folder was there, so what is missing now is away
        seconds=retry_seconds,
    )


def _list_cached(root: str) -> list[str]:
    """Returns the images below `root`, sorted; caches large listings until a folder changes."""
    home, walk = paths_lib.cache_folder(), Walk()
    cache = home / 'listings' / _key(root, walk) if home else None
    names = _cached(cache, root, walk) if cache else []
    if names:
        walk.warn(root)
        return [os.path.join(root, name) for name in names]
    paths = sorted(terminal.progress(_walk(root, walk), 'listing images', unit=' images'))
    walk.warn(root)
    # Access may be given to a closed folder without a change in its time.
    if cache and len(paths) >= LARGE and not walk.closed:
        names = [os.path.relpath(path, root) for path in paths]
        times = {os.path.relpath(f, root): t for f, t in walk.times.items()}
        header = json.dumps({'times': times, 'hidden': walk.hidden, 'skipped': walk.skipped})
        try:
            replace(cache, '\0'.join([header, *names]).encode('utf-8', 'surrogateescape'))
        except OSError as error:
            paths_lib.warn_without_cache(cache, error)
    return paths


def _key(root: str, walk: Walk) -> str:
    key = '\0'.join([os.path.realpath(root), *sorted(walk.kinds)])
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:32]


def _cached(cache: pathlib.Path, root: str, walk: Walk) -> list[str]:
    """Returns the names in a listing and adds what it skipped to the walk.

    Returns no names if the listing is missing, damaged or older than a change.
    """
    try:
        header, *names = cache.read_text('utf-8', 'surrogateescape').split('\0')
        found = json.loads(header)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        paths_lib.warn_without_cache(cache, error)
        return []
    # Adding or removing a file changes the modification time of its folder.
    if any(_time(os.path.join(root, f)) != t for f, t in found['times'].items()):
        return []
    walk.hidden.update(found['hidden'])
    walk.skipped.update(found['skipped'])
    return names


def remember(
    files: Sequence[str], make: Callable[[], Any], size: Callable[[Any], int] = len
) -> Any:
    """Returns the index that `make` makes of some files; caches large ones until a file changes.

    Args:
      files: The indexed files.
      make: Returns the index, with JSON's types.
      size: Returns the number of an index's entries.

    Raises:
      OSError: A file is missing.
    """
    states = [(os.path.realpath(file), os.stat(file)) for file in files]
    if (home := paths_lib.cache_folder()) is None:
        return make()
    key = '\0'.join(f'{path}\0{state.st_size}\0{state.st_mtime_ns}' for path, state in states)
    cache = home / 'listings' / f'{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json'
    try:
        if cache.exists():
            return json.loads(cache.read_text())
    except (OSError, ValueError) as error:
        paths_lib.warn_without_cache(cache, error)
    index = make()
    if size(index) >= LARGE:
        try:
            replace(cache, json.dumps(index).encode())
        except OSError as error:
            paths_lib.warn_without_cache(cache, error)
    return index


def replace(file: pathlib.Path, content: bytes) -> None:
    """Writes a file at once, and its folder: readers never see half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile('wb', dir=file.parent, delete=False) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.replace(partial.name, file)
        except OSError:
            os.unlink(partial.name)
            raise


def _time(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _walk(folder: str, walk: Walk, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the images at any depth; follows links, but never into a cycle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        walk.times[folder] = os.stat(os.path.join(folder, '.')).st_mtime_ns  # enters the folder
        entries = os.scandir(folder)
    except PermissionError:
        if not above:
            raise
        walk.closed.append(folder)
        return
    with entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()  # follows links
            except OSError as error:
                if error.errno not in _CLOSED:
                    raise
                walk.closed.append(entry.path)
                continue
            if not is_folder:
                if walk.is_image(entry.name, entry):
                    yield entry.path
            elif not walk.is_skipped_folder(entry.name):
                yield from _walk(entry.path, walk, (*above, real))
