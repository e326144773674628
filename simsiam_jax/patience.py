"""Waiting for storage that fails for a moment: a remounted folder, a bucket that is busy."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from simsiam_jax import errors

T = TypeVar('T')

SECONDS = 300.0  # default of config.data.retry_seconds
_SHORTEST, _LONGEST = 0.1, 10.0  # seconds between two attempts


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
        reason = getattr(error, 'strerror', None) or errors.reason(error)
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = now
                _warn(f'waiting up to {self._seconds:g} s for {self._what}: {reason}')
            lasted = now - self._began
        if lasted >= self._seconds:
            raise errors.TemporaryError(
                f'{self._what} cannot be read for {lasted:.0f} s now: {reason}. Check the storage, '
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
                    f'{self._what} can be read again after {time.monotonic() - self._began:.1f} s'
                )
                self._began = None


def call(
    function: Callable[[], T],
    what: str,
    is_temporary: Callable[[Exception], bool],
) -> T:
    """Returns function(), called again while it raises a temporary error.

    Args:
      function: Function to call; it can be repeated.
      what: What it reads, for the messages.
      is_temporary: Whether an error may pass; others are raised.

    Raises:
      TemporaryError: The error did not pass within SECONDS.
    """
    patience = Patience(what, SECONDS)
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
    print(f'warning: {text}', file=sys.stderr, flush=True)
