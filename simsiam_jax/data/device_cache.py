"""A small dataset cached on the devices: the host only samples parameters, without TensorFlow."""

import concurrent.futures
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


def train_batches(
    sampler: IndexSampler, recipes: Sequence[Recipe], *, start: int, stop: int, local: slice
) -> Iterator[dict[str, Any]]:
    """Yields this process's part of the batches of steps [start, stop): indices and parameters."""
    for step in range(start, stop):
        indices, views = sample_batch_params(sampler, recipes, step, local)
        yield {'index': indices, 'views': views}


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
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a function that adds images and labels to a device batch, sharded by `sharding`."""
    gather = jax.jit(
        lambda images, labels, index: {'image': images[index], 'label': labels[index]},
        out_shardings=sharding,
    )

    def with_images(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | gather(images, labels, batch['index'])

    return with_images
