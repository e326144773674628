"""Decoded images by index; tolerates a small share of unreadable images, and outages of storage."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from simsiam_jax import errors, patience
from simsiam_jax.data import raster_files
from simsiam_jax.data.decode import DEFAULT, Decoding, decode
from simsiam_jax.data.raster import Raster
from simsiam_jax.data.sources import Source

T = TypeVar('T')

Image = UInt8[np.ndarray, 'H W C']

_ATTEMPTS = 4  # to read an image that alone cannot be read
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class Reader:
    """Reads a source's images; safe to call from many threads.

    While none of the images can be read, reading waits for the storage. An image that alone cannot
    be read, or not decoded, is unreadable.

    Args:
      source: Source of the encoded images.
      channels: Number of channels of the decoded images.
      max_bad_fraction: Largest share of the source's images that may be unreadable.
      retry_seconds: Longest time to wait for the storage.
      decoding: How stored values become 0 to 255.

    Attributes:
      bad: Name -> reason of the images that could not be read at the last attempt.
    """

    def __init__(
        self,
        source: Source,
        channels: int,
        max_bad_fraction: float = 0.01,
        retry_seconds: int | float = patience.SECONDS,
        decoding: Decoding = DEFAULT,
    ):
        self.source, self.channels, self.decoding = source, channels, decoding
        self.max_bad_fraction, self.retry_seconds = max_bad_fraction, retry_seconds
        self.bad: dict[str, str] = {}
        self._lock = threading.Lock()
        self._storage = patience.Patience('the storage of the images', retry_seconds)
        self._last_read = -1  # an image that could be read

    def __len__(self) -> int:
        return len(self.source)

    def over(self, source: Source) -> 'Reader':
        """Returns a reader of another source with the same settings."""
        return Reader(
            source, self.channels, self.max_bad_fraction, self.retry_seconds, self.decoding
        )

    @property
    def identity(self) -> str:
        return self.source.identity

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def read(self, index: int) -> tuple[Image | None, int]:
        """Returns the image, None if it is unreadable, and its label.

        Raises:
          UserError: Too many images are unreadable.
          TemporaryError: The storage has failed for longer than retry_seconds.
        """
        return self._converted(index, lambda encoded: decode(encoded, self.channels, self.decoding))

    def read_deep(self, index: int) -> Raster | None:
        """Returns the image as stored if it is deep; None if not, or if it is unreadable.

        Raises:
          UserError, TemporaryError: See `read`.
        """

        def deep(encoded: bytes) -> Raster | None:
            raster = raster_files.read(encoded) if raster_files.may_be_deep(encoded) else None
            return raster if raster and raster.deep else None

        return self._converted(index, deep)[0]

    def _converted(self, index: int, convert: Callable[[bytes], T]) -> tuple[T | None, int]:
        try:
            encoded, label = self._encoded(index)
            converted = convert(encoded)
        except errors.TemporaryError:
            raise
        except Exception as error:  # no damaged file may stop a run of days
            self._record(self.source.name(index), errors.reason(error))
            return None, -1
        if self.bad:
            with self._lock:
                self.bad.pop(self.source.name(index), None)
        return converted, label

    def _encoded(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and its label; waits while no image can be read."""
        known = self.bad and self.source.name(index) in self.bad
        attempts = 1 if known else _ATTEMPTS
        while True:
            try:
                result = self.source.read(index)
            except Exception as error:
                if self._answers(index):
                    # An outage that ends here may still look like a missing file: try once more.
                    attempts = min(attempts, 2 if isinstance(error, _ABSENT) else attempts) - 1
                    if not attempts:
                        raise
                    time.sleep(0.1)
                elif isinstance(error, _ABSENT) and self._last_read < 0:
                    raise  # the list of images may be wrong
                else:
                    self._storage.wait(error)
            else:
                self._last_read = index
                self._storage.succeeded()
                return result

    def _answers(self, index: int) -> bool:
        """Returns whether another image can be read now."""
        for other in {self._last_read, 0, len(self) // 2, len(self) - 1} - {-1, index}:
            try:
                self.source.read(other)
            except Exception:  # of any type, as above
                continue
            return True
        return False

    def example(self, index: int) -> tuple[Image, int]:
        """Returns image and label; an unreadable image is replaced by the next readable one.

        The replacement is the same in every run.
        """
        for neighbor in range(index, index + len(self)):
            image, label = self.read(neighbor % len(self))
            if image is not None:
                return image, label
        raise self._fail('none of the images can be read')

    def _record(self, name: str, reason: str) -> None:
        with self._lock:
            self.bad[name] = reason
            count = len(self.bad)
        if count > self.max_bad_fraction * len(self):
            raise self._fail(
                f'{count} of {len(self)} images cannot be read, more than '
                f'config.data.max_bad_fraction={self.max_bad_fraction:g} allows '
                f'(last: {name}: {reason})'
            )

    def _fail(self, message: str) -> errors.UserError:
        return errors.UserError(
            f'{message}. Fix or remove them, or raise config.data.max_bad_fraction'
        )
