"""Sampling of image indices: all randomness of a run's data is a function of (seed, step)."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors


def evenly_spaced(count: int, most: int) -> Int[np.ndarray, 'n']:
    """Returns at most `most` evenly spaced indices below `count`, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


@dataclasses.dataclass(frozen=True)
class IndexSampler:
    """Draws the images of each batch.

    Every epoch is a new permutation of all images. An epoch drops its last incomplete batch, as
    PyTorch's drop_last does. The order does not depend on the number of hosts: each host loads
    its slice of the global batch.

    Attributes:
      seed: Seed of the run.
      size: Number of images.
      batch_size: Global batch size.
    """

    seed: int
    size: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise errors.UserError(f'seed is {self.seed}; expected 0 or more')
        if self.batch_size < 1:
            raise errors.UserError(f'batch_size is {self.batch_size}; expected 1 or more')
        if self.batch_size > self.size:
            raise errors.UserError(
                f'batch_size is {self.batch_size}, but the training source has only '
                f'{self.size} images. Set a smaller batch_size or add images'
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def steps(self, epochs: int | float) -> int:
        """Returns the number of steps in `epochs` epochs, rounded."""
        return round(epochs * self.steps_per_epoch)

    def indices(self, step: int) -> Int[np.ndarray, 'B']:
        """Returns the indices of the images in the global batch of this step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.batch_size
        return _permutation(self.seed, epoch, self.size)[start : start + self.batch_size]

    def rng(self, step: int, view: int) -> np.random.Generator:
        """Returns the generator of a view's augmentation parameters in this step."""
        return np.random.default_rng((self.seed, 1, step, view))


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, 'N']:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)
