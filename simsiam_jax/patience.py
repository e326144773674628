"""Waiting for storage that fails for a moment: a remounted folder, a bucket that is busy."""

import errno
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from simsiam_jax import errors, terminal

T = TypeVar('T')

# Errors that libraries raise for a bucket, none of which is an OSError: module -> class.
_ERROR_CLASSES = {
    'tensorflow.python.framework.errors_impl': 'OpError',
    'google.auth.exceptions': 'GoogleAuthError',
    'google.api_core.exceptions': 'GoogleAPIError',
}

# Errors after which the data may still be intact, because nothing was read. TensorStore's messages
# start with these names, TensorFlow's errors have these codes, and Google's client has HTTP's.
_FORBIDDEN = {'PERMISSION_DENIED': 7, 'UNAUTHENTICATED': 16}
_TEMPORARY = {
    'CANCELLED': 1,
    'DEADLINE_EXCEEDED': 4,
    'RESOURCE_EXHAUSTED': 8,
    'ABORTED': 10,
    'INTERNAL': 13,
    'UNAVAILABLE': 14,
}
_TEMPORARY_HTTP = (408, 429, 500, 502, 503, 504)

# Errors that waiting does not cure: of full or write-protected disks, and of paths.
_LASTING = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)

# Errors of the system while a disk is away, or too busy for a moment.
_OUTAGES = (
    *(errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    *(errno.EBUSY, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
)

# A path is missing: damage or a wrong path, or storage that is away as a whole.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

SECONDS = 300.0  # default of config.data.retry_seconds
_SHORTEST, _LONGEST = 0.1, 10.0  # seconds between two attempts


def io_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that reading and writing can raise, on a disk and in a bucket."""
    # A library that is not imported cannot have raised an error.
    libraries = [(sys.modules.get(module), name) for module, name in _ERROR_CLASSES.items()]
    return (OSError, *(getattr(library, name) for library, name in libraries if library))


def is_forbidden(error: Exception) -> bool:
    """Returns whether the error means that a path may not be read."""
    return (
        isinstance(error, PermissionError)
        or getattr(error, 'error_code', None) in _FORBIDDEN.values()
        or str(error).startswith(tuple(_FORBIDDEN))
    )


def is_temporary(error: Exception) -> bool:
    """Returns whether reading or writing failed for a reason that may pass and is no damage.

    A missing file, a wrong checksum or text that cannot be parsed is damage.
    """
    error = getattr(error, 'cause', None) or error  # of Google's RetryError
    if isinstance(error, ABSENT) or is_forbidden(error) or getattr(error, 'errno', 0) in _LASTING:
        return False
    return (
        isinstance(error, (OSError, MemoryError))
        or getattr(error, 'code', None) in _TEMPORARY_HTTP
        or getattr(error, 'retryable', False)  # of Google's login
        or getattr(error, 'error_code', None) in _TEMPORARY.values()
        or str(error).startswith(tuple(_TEMPORARY))
    )


def is_away(error: Exception) -> bool:
    """Returns whether storage that was there may be away: as is_temporary, or a path is missing."""
    return is_temporary(error) or isinstance(error, ABSENT)


def outage(error: BaseException) -> Exception | None:
    """Returns the error of storage that may pass, in a chain of errors; None if there is none.

    An OSError must have the number of an outage: libraries also raise it for damaged files, and
    without a network. An outage that has been waited for (TemporaryError) is none.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, errors.TemporaryError):
        if isinstance(link, OSError):
            if link.errno in _OUTAGES:
                return link
        elif isinstance(link, io_errors()) and is_temporary(link):
            return link
        link = link.__cause__ or link.__context__
    return None


class Patience:
    """Sleeps between attempts until storage works again, for a limited time; for many threads.

    Args:
      what: What is waited for, for the messages.
      seconds: Duration of an outage after which wait() gives up.
    """

    def __init__(self, what: str, seconds: float):
        self._what, self._seconds = what, seconds
        self._began: float | None = None
        self._lock = threading.Lock()

    def wait(self, error: Exception) -> None:
        """Sleeps after a failed attempt, the longer the outage lasts.

        Raises:
          TemporaryError: The outage has lasted too long.
        """
        cause = outage(error) or error
        reason = getattr(cause, 'strerror', None) or errors.reason(cause)
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = now
                _warn(f'waiting up to {self._seconds:g} s for {self._what}: {reason}')
            lasted = now - self._began
        if lasted >= self._seconds:
            raise errors.TemporaryError(
                f'{self._what} cannot be used for {lasted:.0f} s now: {reason}. Check the storage, '
                'then rerun the same command'
            ) from error
        time.sleep(min(max(lasted / 2, _SHORTEST), _LONGEST, max(self._seconds - lasted, 0)))

    def succeeded(self) -> None:
        """Ends an outage, after a successful attempt."""
        if self._began is None:
            return
        with self._lock:
            if self._began is not None:
                _warn(
                    f'{self._what} can be used again after {time.monotonic() - self._began:.1f} s'
                )
                self._began = None


def call(
    function: Callable[[], T],
    what: str,
    is_temporary: Callable[[Exception], bool] = is_temporary,
    *,
    seconds: int | float | None = None,
) -> T:
    """Returns function(), called again while it raises a temporary error.

    Args:
      function: Function to call; it can be repeated.
      what: What it uses, for the messages.
      is_temporary: Whether an error may pass; others are raised.
      seconds: Longest time to wait; None waits for SECONDS.

    Raises:
      TemporaryError: The error did not pass in time.
    """
    patience = Patience(what, SECONDS if seconds is None else seconds)
    while True:
        try:
            result = function()
        except Exception as error:
            if not is_temporary(error):
                raise
            patience.wait(error)
        else:
            patience.succeeded()
            return result


def _warn(text: str) -> None:
    terminal.show(f'warning: {text}', sys.stderr)
