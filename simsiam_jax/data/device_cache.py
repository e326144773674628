"""A small dataset cached on the devices: the host only samples parameters, without TensorFlow."""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from simsiam_jax import errors
from simsiam_jax.data import jax_augment
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe, check_resize, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.data.sources import ArraySource

# A thread draws the parameters of this many images (of two or more views) at a time, in at most so
# many steps: a fast step cannot wait for NumPy, nor for a transfer of a batch's many small arrays.
_BLOCK_IMAGES, _BLOCK_STEPS = 2**15, 64


def train_batches(
    sampler: IndexSampler,
    recipes: Sequence[Recipe],
    *,
    start: int,
    stop: int,
    local: slice,
    send: Callable[[Any], Any],
    select: Callable[[Any, np.ndarray], Any],
) -> Iterator[Any]:
    """Yields the batches of steps [start, stop), whose parameters are drawn in the background.

    Args:
      sampler: Order of the images.
      recipes: Recipe of each view.
      start: First step.
      stop: Step after the last.
      local: Part of each global batch that this process draws.
      send: Moves a block to the devices: 'index' and 'views' of several steps, [steps, B, ...].
      select: Makes the batch at a position, int32 [], of a block.
    """
    length = max(1, min(_BLOCK_IMAGES // sampler.batch_size, _BLOCK_STEPS, stop - start))

    def block(first: int) -> Any:
        steps = range(first, first + length)
        drawn = [sample_batch_params(sampler, recipes, step, local) for step in steps]
        indices, views = zip(*drawn, strict=True)
        return send(
            {'index': np.stack(indices), 'views': jax.tree.map(lambda *x: np.stack(x), *views)}
        )

    # The last block repeats steps of the one before: programs are compiled for one length.
    firsts = [min(first, stop - length) for first in range(start, stop, length)]
    step = start
    for first, arrays in zip(firsts, _ahead(block, firsts), strict=True):
        for position in range(step - first, length):
            yield select(arrays, np.asarray(position, np.int32))
        step = first + length


def _ahead(function: Callable[[int], Any], items: Sequence[int], depth: int = 2) -> Iterator[Any]:
    """Yields function(item) in order, while a thread computes the next `depth`."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        later = iter(items)
        queue = collections.deque(pool.submit(function, x) for x in itertools.islice(later, depth))
        while queue:
            result = queue.popleft().result()
            queue.extend(pool.submit(function, x) for x in itertools.islice(later, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def eval_batches(
    source: ArraySource, *, batch_size: int, channels: int, size: int, resize: int, local: slice
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields center crops [B, S, S, C] in [0, 1], labels [B] and indices [B] in order.

    The last batch is padded with copies of the last image at index -1. See host.eval_batches for
    the arguments.
    """
    check_resize(size, resize)
    check_images(source, channels, 0 if resize else size)
    for start in range(0, len(source), batch_size):
        position = (start + np.arange(batch_size))[local]
        index = np.minimum(position, len(source) - 1)
        images = jax_augment.center(source.images[index], size, resize)
        valid = position < len(source)
        yield np.asarray(images), source.labels[index], np.where(valid, position, -1)


def load(reader: Reader, limit: int) -> ArraySource | None:
    """Loads all images of a source into memory.

    Returns None if they need more than `limit` bytes, differ in size, or some are unreadable.
    """
    first, _ = reader.read(0)
    if first is None or first.nbytes * len(reader) > limit:
        return None
    images = np.empty((len(reader), *first.shape), np.uint8)
    labels = np.empty(len(reader), np.int64)

    def put(index: int) -> bool:
        image, labels[index] = reader.read(index)
        if image is None or image.shape != first.shape:
            return False
        images[index] = image
        return True

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(reader), 1024):  # stops early if sizes differ
            if not all(threads.map(put, range(start, min(start + 1024, len(reader))))):
                return None
    return ArraySource(images, labels, reader.classes, reader.source.identity)


def check_images(source: ArraySource, channels: int, size: int = 0) -> None:
    """Raises UserError if the images have other channels, or sides other than a nonzero `size`."""
    height, width, has = source.images.shape[1:]
    if has != channels:
        raise errors.UserError(
            f'config.data.channels is {channels}, but the images have {has} channels. '
            f'Set config.data.channels={has}'
        )
    if size and (height, width) != (size, size):
        raise errors.UserError(
            f'the images are {height}x{width}; expected {size}x{size} (config.augment.size), '
            'because config.eval.resize is 0. Set config.eval.resize'
        )


def gatherer(
    images: UInt8[Array, 'N H W C'], labels: Int[Array, 'N'], sharding: jax.sharding.Sharding
) -> Callable[[dict[str, Any], np.ndarray], dict[str, Any]]:
    """Returns the `select` of train_batches that adds images and labels.

    Args:
      images: All images, on every device.
      labels: Label of each image.
      sharding: Sharding of the batch.
    """

    def gather(images: Array, labels: Array, block: dict[str, Any], position: Array) -> Any:
        batch = jax.tree.map(lambda x: x[position], block)
        index = batch['index']
        return batch | {'image': images[index], 'label': labels[index]}

    return functools.partial(jax.jit(gather, out_shardings=sharding), images, labels)
