"""Decoded images by index; tolerates a small share of unreadable images."""

import threading

import numpy as np
from jaxtyping import UInt8

from simsiam_jax import errors
from simsiam_jax.data.decode import decode
from simsiam_jax.data.sources import Source

Image = UInt8[np.ndarray, 'H W C']


class Reader:
    """Reads a source's images; safe to call from many threads.

    Args:
      source: Source of the encoded images.
      channels: Number of channels of the decoded images.
      max_bad_fraction: Largest share of the source's images that may be unreadable.

    Attributes:
      bad: Name -> reason of the images that could not be read so far.
      error: The error that stopped reading; data.host raises it where TensorFlow cannot hide it.
    """

    def __init__(self, source: Source, channels: int, max_bad_fraction: float = 0.01):
        self.source, self.channels = source, channels
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[str, str] = {}
        self.error: errors.UserError | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

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
        """
        try:
            encoded, label = self.source.read(index)
            return decode(encoded, self.channels), label
        # No error of a damaged file or a lost disk may stop a run of days.
        except Exception as error:
            self._record(self.source.name(index), errors.reason(error))
            return None, -1

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
        self.error = errors.UserError(
            f'{message}. Fix or remove them, or raise config.data.max_bad_fraction'
        )
        return self.error
