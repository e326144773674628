"""Workdirs in a bucket, gs://BUCKET/..., beside those on a disk."""

import contextlib
import os
import sys
from collections.abc import Iterator

from etils import epath

from simsiam_jax import errors, lazy_tf

# What is raised for a bucket is no OSError; only what is imported can have raised it.
_KINDS = {
    'tensorflow.python.framework.errors_impl': 'OpError',
    'google.auth.exceptions': 'GoogleAuthError',
    'google.api_core.exceptions': 'GoogleAPIError',
}

# TensorStore begins with these, and TensorFlow gives their numbers, where nothing was read: what is
# there may be whole.
_UNREAD = {'DEADLINE_EXCEEDED': 4, 'PERMISSION_DENIED': 7, 'UNAVAILABLE': 14, 'UNAUTHENTICATED': 16}


def is_remote(path: str | os.PathLike[str]) -> bool:
    return '://' in os.fspath(path)


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """The path, absolute where it is of a disk.

    Raises:
      UserError: it is of no disk and no bucket, or what reads buckets is not installed.
    """
    if not is_remote(path):
        return epath.Path(path).absolute()
    if not os.fspath(path).startswith('gs://'):
        raise errors.UserError(f'{path} is no folder; expected one, or gs://BUCKET/FOLDER')
    lazy_tf.load()  # epath would, but with its start-up lines and on the accelerators
    return epath.Path(path)  # absolute() would look for a folder `gs:` here


def mkdirs(folder: epath.Path) -> None:
    """Makes the folder with all above it.

    A bucket has none, and TensorFlow looks for ever for the ones above in a bucket that is not
    there: the first file that is written tells.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def require_client(folder: epath.Path) -> None:
    """Raises UserError where Orbax would miss what it asks about a bucket with."""
    if not is_remote(folder):
        return
    try:
        from google.cloud import storage  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f'google-cloud-storage is not installed, and checkpoints in {folder} need it; '
            'pip install google-cloud-storage'
        ) from error


def io_errors() -> tuple[type[Exception], ...]:
    """What reading and writing raises, on a disk and in a bucket."""
    libraries = [(sys.modules.get(name), kind) for name, kind in _KINDS.items()]
    return (OSError, *(getattr(library, kind) for library, kind in libraries if library))


def reason(error: Exception) -> str:
    """What such a failure says, in a line."""
    return getattr(error, 'strerror', None) or errors.reason(error)


def unreadable(path: str | os.PathLike[str], error: Exception) -> errors.UserError:
    """What to tell of such a failure."""
    return errors.UserError(
        f'{path} cannot be read: {reason(error)}; it must be there, and yours to read'
    )


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Such a failure within it becomes a UserError."""
    try:
        yield
    except io_errors() as error:
        raise unreadable(path, error) from error


def is_unreachable(error: Exception) -> bool:
    """Whether what was to be read is out of reach, and not damaged."""
    return (
        isinstance(error, PermissionError)
        or getattr(error, 'error_code', None) in _UNREAD.values()
        or str(error).startswith(tuple(_UNREAD))
    )


def write_hint(path: str | os.PathLike[str]) -> str:
    """What to do where a workdir cannot be written."""
    if not is_remote(path):
        return 'give another --workdir'
    return (
        'the bucket must be there and the credentials (gcloud auth application-default login) '
        'must allow it; or give another --workdir'
    )
