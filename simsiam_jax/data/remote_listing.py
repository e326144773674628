"""Lists the images below a URL in few requests, and keeps large listings for a day."""

import datetime
import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Iterable, Iterator

from simsiam_jax import errors, lazy_tf, patience, terminal
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import listing

_KEPT = 24 * 3600  # seconds


def list_images(root: str, retry_seconds: int | float = patience.SECONDS) -> list[str]:
    """Returns the images below a URL, sorted; waits if the storage fails for a moment.

    No request tells whether a bucket has changed, so a large listing is used again for a day, by
    the evaluation and by runs that are resumed. A line names its age and its file.

    Raises:
      OSError: The folder cannot be read.
      TemporaryError: The storage has failed for longer than retry_seconds.
    """
    try:
        names = _list_cached(root, retry_seconds)
    except patience.io_errors() as error:
        raise OSError(errors.reason(error)) from error
    return [os.path.join(root, name) for name in names]


def _list_cached(root: str, retry_seconds: int | float) -> list[str]:
    """Returns the names of the images relative to the root."""
    home = paths_lib.cache_folder()
    key = hashlib.sha256(root.rstrip('/').encode()).hexdigest()[:32]
    cache = home / 'listings' / key if home else None
    if cache and (kept := _cached(cache, root)):
        return kept
    walk = listing.Walk()
    files = _objects(root, retry_seconds) if root.startswith('gs://') else _walk(root)
    shown = terminal.progress(_visible(files, walk), 'listing images', unit=' files')
    names = sorted(name for name in shown if walk.is_image(os.path.basename(name)))
    walk.warn(root)
    if cache and len(names) >= listing.LARGE:
        try:
            listing.replace(cache, '\0'.join(names).encode())
        except OSError as error:
            paths_lib.warn_without_cache(cache, error)
    return names


def _cached(cache: pathlib.Path, root: str) -> list[str]:
    """Returns the names in a kept listing; none if it is missing, damaged or too old."""
    try:
        age = time.time() - cache.stat().st_mtime
        names = cache.read_text('utf-8').split('\0') if age < _KEPT else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        paths_lib.warn_without_cache(cache, error)
        return []
    if names:
        terminal.say(
            f'{root}: using the listing from {datetime.timedelta(seconds=round(age))} ago, '
            f'{len(names):,} images; remove {cache} to list it again'
        )
    return names


def _visible(names: Iterable[str], walk: listing.Walk) -> Iterator[str]:
    """Yields the files that are in no hidden folder or folder of a system."""

    @functools.cache
    def is_visible(folder: str) -> bool:
        above, name = os.path.split(folder)
        return not folder or (is_visible(above) and not walk.is_skipped_folder(name))

    return (name for name in names if is_visible(os.path.dirname(name)))


def _objects(root: str, retry_seconds: int | float) -> Iterator[str]:
    """Yields the names of the objects below gs://BUCKET/FOLDER, relative to it.

    TensorStore and TensorFlow can list too, but both leave out in silence what is refused to them.

    Raises:
      UserError: Google's client is not installed.
    """
    try:
        from google.cloud import storage
    except ImportError as error:
        raise errors.UserError(
            f'google-cloud-storage is not installed; listing {root} needs it. '
            'Run pip install google-cloud-storage'
        ) from error
    bucket, _, folder = root.removeprefix('gs://').partition('/')
    prefix = folder and f'{folder.rstrip("/")}/'
    client = storage.Client(project=None)
    token = None

    def next_page() -> tuple[list[str], str | None]:
        blobs = client.list_blobs(
            bucket,
            prefix=prefix,
            page_token=token,
            fields='items(name),nextPageToken',
            retry=None,  # as patience prints that it waits
        )
        page = next(blobs.pages)
        return [blob.name.removeprefix(prefix) for blob in page], blobs.next_page_token

    while True:
        names, token = patience.call(next_page, f'the image folder {root}', seconds=retry_seconds)
        yield from names
        if token is None:
            return


def _walk(root: str) -> Iterator[str]:
    """Yields the files below any URL that TensorFlow reads, relative to it."""
    tf = lazy_tf.load()
    for folder, _, names in tf.io.gfile.walk(root):
        below = folder[len(root) :].strip('/')
        yield from (os.path.join(below, name) for name in names)
