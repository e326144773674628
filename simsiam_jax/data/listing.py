"""Lists the images below a folder, at any depth."""

import collections
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from simsiam_jax import errors, patience, terminal
from simsiam_jax import paths as paths_lib

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.npy')

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
      times: Time of the last change of each folder, nanoseconds.
      closed: Folders that may not be entered.
      skipped: Number of skipped folders by name, and of hidden images.
    """

    times: dict[str, int] = dataclasses.field(default_factory=dict)
    closed: list[str] = dataclasses.field(default_factory=list)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def is_skipped_folder(self, name: str) -> bool:
        """Returns whether to skip the folder, and counts it if so."""
        skipped = _is_system(name)
        self.skipped[name] += skipped
        return skipped

    def is_image(self, name: str) -> bool:
        """Returns whether the file is an image that is not hidden; counts the hidden ones."""
        if not name.lower().endswith(EXTENSIONS):
            return False
        self.skipped['hidden images'] += name.startswith('.')
        return not name.startswith('.')

    def _counts(self) -> list[str]:
        return sorted(f'{paths_lib.printable(name)} ({n})' for name, n in (+self.skipped).items())

    def warn(self, root: str) -> None:
        """Prints what was skipped."""
        if skipped := self._counts():
            more = f' and {len(skipped) - 8} more names' if len(skipped) > 8 else ''
            errors.warn_once(
                f'image folder {root}: skipped hidden or of the system: '
                f'{", ".join(skipped[:8])}{more}'
            )
        if self.closed:
            names = ', '.join(map(paths_lib.printable, self.closed[:3]))
            more = f' and {len(self.closed) - 3} more' if len(self.closed) > 3 else ''
            errors.warn_once(
                f'image folder {root}: skipped {len(self.closed)} that may not be entered '
                f'({names}{more}). If they contain images, give yourself access'
            )


def _is_system(name: str) -> bool:
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
    home = paths_lib.cache_folder()
    cache = home / 'listings' / _key(root) if home else None
    if cache and (names := _cached(cache, root)):
        return [os.path.join(root, name) for name in names]
    walk = Walk()
    paths = sorted(terminal.progress(_walk(root, walk), 'listing images', unit=' images'))
    walk.warn(root)
    # Access may be given to a closed folder without a change in its time.
    if cache and len(paths) >= LARGE and not walk.closed:
        names = [os.path.relpath(path, root) for path in paths]
        header = json.dumps({os.path.relpath(f, root): t for f, t in walk.times.items()})
        try:
            replace(cache, '\0'.join([header, *names]).encode('utf-8', 'surrogateescape'))
        except OSError as error:
            paths_lib.warn_without_cache(cache, error)
    return paths


def _key(root: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]


def _cached(cache: pathlib.Path, root: str) -> list[str]:
    """Returns the names in a listing; none if it is missing, damaged or older than a change."""
    try:
        header, *names = cache.read_text('utf-8', 'surrogateescape').split('\0')
        times = json.loads(header)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        paths_lib.warn_without_cache(cache, error)
        return []
    # Adding or removing a file changes the modification time of its folder.
    return names if all(_time(os.path.join(root, f)) == t for f, t in times.items()) else []


def replace(file: pathlib.Path, content: bytes) -> None:
    """Writes a file at once, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile('wb', dir=file.parent, delete=False) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.replace(partial.name, file)  # atomic: readers never see half a file
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
                if walk.is_image(entry.name):
                    yield entry.path
            elif not walk.is_skipped_folder(entry.name):
                yield from _walk(entry.path, walk, (*above, real))
