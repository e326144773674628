"""Parts of labeled sources: label fractions and held-out images."""

import concurrent.futures
import hashlib
import itertools
import os

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors, terminal
from simsiam_jax.data.listed import Listed
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sources import ArraySource, Source

_BLOCK = 1000  # images whose labels are read in a task


class Subset:
    """The images of a source at some indices."""

    def __init__(self, source: Source, indices: Int[np.ndarray, 'n']):
        self.source, self.indices, self.classes = source, indices, source.classes

    @property
    def identity(self) -> str:
        return _identity(self.source, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


def take(source: ArraySource | Reader, indices: Int[np.ndarray, 'n']) -> ArraySource | Reader:
    """Returns a source of the images at these indices."""
    if isinstance(source, ArraySource):
        identity = _identity(source, indices)
        return ArraySource(source.images[indices], source.labels[indices], source.classes, identity)
    return source.over(Subset(source.source, indices))


def _identity(source: ArraySource | Source, indices: Int[np.ndarray, 'n']) -> str:
    return f'{source.identity} at {hashlib.sha256(indices.tobytes()).hexdigest()}'


def labels(source: ArraySource | Reader) -> Int[np.ndarray, 'N']:
    """Returns the label of every image.

    If only the records contain the labels, all records are read, but no image is decoded.
    """
    if isinstance(source, ArraySource):
        return source.labels
    records = source.source
    if isinstance(records, Listed):
        return np.array(records.labels)
    if isinstance(records, Subset):
        return labels(source.over(records.source))[records.indices]

    def of_block(start: int) -> list[int]:
        return [records.read(i)[1] for i in range(start, min(start + _BLOCK, len(records)))]

    starts = range(0, len(records), _BLOCK)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        # A task for each image would take longer than reading it.
        blocks = threads.map(of_block, starts)
        shown = terminal.progress(
            itertools.chain.from_iterable(blocks),
            'reading labels',
            total=len(records),
            unit=' images',
        )
        return np.array(list(shown))


def split(
    labels: Int[np.ndarray, 'N'], fraction: float, seed: int
) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'm']]:
    """Returns the indices of a class-balanced share of the images, and of the rest.

    The share of each class is rounded, and at least one image. The split depends on its arguments
    only.

    Args:
      labels: Label of each image.
      fraction: Share of the images of each class in the first part.
      seed: Seed of the choice.

    Raises:
      UserError: The fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise errors.UserError(
            f'the share of the images is {fraction}; expected above 0 and at most 1'
        )
    rng = np.random.default_rng((seed, 2))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        chosen[rng.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
