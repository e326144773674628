"""Reading and writing workdirs on a disk or in a bucket, gs://BUCKET/...."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from simsiam_jax import errors, lazy_tf, paths, patience


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path is a URL, such as gs://BUCKET/FOLDER."""
    return '://' in os.fspath(path)


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path; on a disk it is made absolute, and ~ is the home folder.

    Raises:
      UserError: The path is neither on a disk nor in a bucket, or TensorFlow, which reads buckets,
        is not installed.
    """
    if not is_remote(path):
        return epath.Path(paths.expand(path)).absolute()
    if not os.fspath(path).startswith('gs://'):
        raise errors.UserError(
            f'{path} is not a folder; expected a local path or gs://BUCKET/FOLDER'
        )
    lazy_tf.load()  # epath's own import prints start-up lines and uses the accelerators
    return epath.Path(path)  # absolute() would treat gs: as a folder of the working directory


def mkdirs(folder: epath.Path) -> None:
    """Creates the folder and its parents on a disk; does nothing in a bucket.

    Buckets have no folders, and TensorFlow searches forever for the parents in a bucket that does
    not exist. A missing bucket shows when the first file is written.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_text(path: epath.Path) -> str:
    """Returns the content of a file; '' if it is missing.

    Path.exists() must not be asked first: it returns False for storage that fails for a moment.
    """
    try:
        return path.read_text()
    except FileNotFoundError:
        return ''


def require_client(folder: epath.Path) -> None:
    """Raises UserError if the folder is in a bucket and Orbax's client for it is missing."""
    if not is_remote(folder):
        return
    try:
        from google.cloud import storage  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f'google-cloud-storage is not installed; checkpoints in {folder} need it. '
            'Run pip install google-cloud-storage'
        ) from error


def reason(error: Exception) -> str:
    """Returns the message of one of patience.io_errors() in one line."""
    return getattr(error, 'strerror', None) or errors.reason(error)


def read_error(path: str | os.PathLike[str], error: Exception) -> errors.UserError:
    """Returns the UserError for a path that could not be read because of `error`."""
    return errors.UserError(
        f'{path} cannot be read: {reason(error)}. Check that it exists and that you may read it'
    )


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any of patience.io_errors() within this context into a UserError about `path`."""
    try:
        yield
    except patience.io_errors() as error:
        raise read_error(path, error) from error


def write_hint(path: str | os.PathLike[str]) -> str:
    """Returns what to do if a workdir cannot be written."""
    if not is_remote(path):
        return 'pass another --workdir'
    return (
        'check that the bucket exists and that your credentials (gcloud auth application-default '
        'login) may write to it, or pass another --workdir'
    )
