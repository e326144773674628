"""Decoded images by index, from sources with images that cannot be read."""

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
      channels: of the images.
      max_bad_fraction: of the source; where more cannot be read, reading ends.

    Attributes:
      bad: name -> reason of the images that could not be read so far.
      error: what ended the reading; it is raised where TensorFlow cannot hide it.
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
        """The image, None where it is bad, and its label.

        Raises:
          UserError: too many images are bad.
        """
        try:
            encoded, label = self.source.read(index)
            return decode(encoded, self.channels), label
        # Whatever a damaged file or a vanished disk brings about must not end a run of days.
        except Exception as error:
            self._note(self.source.name(index), errors.reason(error))
            return None, -1

    def example(self, index: int) -> tuple[Image, int]:
        """The image with its label, or where it is bad the next good one: alike in every run."""
        for neighbor in range(index, index + len(self)):
            image, label = self.read(neighbor % len(self))
            if image is not None:
                return image, label
        raise self._end('none of the images can be read')

    def _note(self, name: str, reason: str) -> None:
        with self._lock:
            self.bad[name] = reason
            count = len(self.bad)
        if count > self.max_bad_fraction * len(self):
            raise self._end(
                f'{count} of {len(self)} images cannot be read, more than '
                f'config.data.max_bad_fraction allows; the last: {name}: {reason}'
            )

    def _end(self, message: str) -> errors.UserError:
        self.error = errors.UserError(
            f'{message}; mend them, take them out of the source or raise the fraction'
        )
        return self.error
