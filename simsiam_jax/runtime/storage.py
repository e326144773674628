"""Reading and writing workdirs on a disk or in a bucket, gs://BUCKET/...."""

import contextlib
import os
import sys
from collections.abc import Iterator

from etils import epath

from simsiam_jax import errors, lazy_tf, paths

# Errors that libraries raise for a bucket, none of which is an OSError: module -> class.
_ERROR_CLASSES = {
    'tensorflow.python.framework.errors_impl': 'OpError',
    'google.auth.exceptions': 'GoogleAuthError',
    'google.api_core.exceptions': 'GoogleAPIError',
}

# Errors after which the data may still be intact, because nothing was read. TensorStore's messages
# start with these names, and TensorFlow's errors have these codes.
_FORBIDDEN = {'PERMISSION_DENIED': 7, 'UNAUTHENTICATED': 16}
_TEMPORARY = {
    'CANCELLED': 1,
    'DEADLINE_EXCEEDED': 4,
    'RESOURCE_EXHAUSTED': 8,
    'ABORTED': 10,
    'INTERNAL': 13,
    'UNAVAILABLE': 14,
}


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


def io_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that reading and writing can raise, on a disk and in a bucket."""
    # A library that is not imported cannot have raised an error.
    libraries = [(sys.modules.get(module), name) for module, name in _ERROR_CLASSES.items()]
    return (OSError, *(getattr(library, name) for library, name in libraries if library))


def reason(error: Exception) -> str:
    """Returns the message of one of io_errors() in one line."""
    return getattr(error, 'strerror', None) or errors.reason(error)


def read_error(path: str | os.PathLike[str], error: Exception) -> errors.UserError:
    """Returns the UserError for a path that could not be read because of `error`."""
    return errors.UserError(
        f'{path} cannot be read: {reason(error)}. Check that it exists and that you may read it'
    )


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any of io_errors() within this context into a UserError about `path`."""
    try:
        yield
    except io_errors() as error:
        raise read_error(path, error) from error


def is_forbidden(error: Exception) -> bool:
    """Returns whether the error means that a path may not be read."""
    return (
        isinstance(error, PermissionError)
        or getattr(error, 'error_code', None) in _FORBIDDEN.values()
        or str(error).startswith(tuple(_FORBIDDEN))
    )


def is_temporary(error: Exception) -> bool:
    """Returns whether a read failed for a reason that may pass and is no damage.

    A missing file, a wrong checksum or text that cannot be parsed is damage.
    """
    absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, absent) or is_forbidden(error):
        return False
    return (
        isinstance(error, (OSError, MemoryError))
        or getattr(error, 'error_code', None) in _TEMPORARY.values()
        or str(error).startswith(tuple(_TEMPORARY))
    )


def write_hint(path: str | os.PathLike[str]) -> str:
    """Returns what to do if a workdir cannot be written."""
    if not is_remote(path):
        return 'pass another --workdir'
    return (
        'check that the bucket exists and that your credentials (gcloud auth application-default '
        'login) may write to it, or pass another --workdir'
    )
