"""The input pipeline on the host: threads that decode, crop and resize in compiled code."""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from simsiam_jax import errors
from simsiam_jax.data import host_stage, jax_augment
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe, check_resize, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler

# What runs on the device besides the normalization: nothing, the color operations with blur and
# flip, or the crops too.
ON_DEVICE = ('none', 'color', 'all')
# Images that a thread loads in one call, at most: each call costs Python's global lock.
_IMAGES = 16


def to_views(batch: dict[str, Any], recipes: Sequence[Recipe]) -> list[Any]:
    """Returns the normalized views of a device batch, whichever stage of the host made it."""
    if 'image' in batch:
        return [
            jax_augment.augment(batch['image'], params, recipe, batch.get('size'))
            for params, recipe in zip(batch['views'], recipes, strict=True)
        ]
    if 'views' in batch:
        return [
            jax_augment.color(crop, params, recipe)
            for crop, params, recipe in zip(batch['crops'], batch['views'], recipes, strict=True)
        ]
    return [
        jax_augment.normalize(view, recipe.mean, recipe.std)
        for view, recipe in zip(batch['crops'], recipes, strict=True)
    ]


def train_batches(
    reader: Reader,
    sampler: IndexSampler,
    recipes: Sequence[Recipe],
    *,
    on_device: str,
    canvas: int,
    start: int,
    stop: int,
    local: slice,
) -> Iterator[dict[str, Any]]:
    """Yields this process's part of the batches of steps [start, stop), for `to_views`.

    Every batch has 'index' and 'label', int64 [B]; the label is -1 if there is none. The other
    entries depend on `on_device`:

    - 'none': 'crops', a finished uint8 view [B, S, S, C] for each recipe.
    - 'color': 'crops' without color operations, and 'views', the parameters of each view.
    - 'all': 'image', uint8 [B, canvas, canvas, C], with the images in the upper left corners;
      'size', their heights and widths; and 'views'. Larger images are shrunk to the canvas.

    Raises:
      UserError: Too many images cannot be read.
    """
    stage = host_stage.make_stage(on_device, recipes, channels=reader.channels, canvas=canvas)
    batch_size = local.stop - local.start
    batch_params = _once(lambda step: sample_batch_params(sampler, recipes, step, local))

    def load(step: int, part: slice, outputs: list[np.ndarray]) -> None:
        indices, views = batch_params(step)
        images, labels = zip(*map(reader.example, indices[part].tolist()), strict=True)
        outputs[0][:] = labels
        params = [{k: v[part] for k, v in view.items()} for view in views]
        stage.load(list(images), params, outputs[1:])

    outputs = [((), np.int64), *stage.outputs()]
    steps = range(start, stop)
    batches = _in_threads(load, steps, batch_size, outputs)
    for step, (label, *arrays) in zip(steps, batches, strict=True):
        indices, views = batch_params(step)
        yield {'index': indices, 'label': label} | stage.assemble(arrays, views)


def eval_batches(
    reader: Reader, *, batch_size: int, size: int, resize: int, local: slice
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields center crops uint8 [B, S, S, C], labels [B] and indices [B] of all images in order.

    Unreadable images, and the padding of the last batch, are black and have index -1.

    Args:
      reader: Reader of the images.
      batch_size: Global batch size.
      size: Side of the crop.
      resize: Shorter side before the crop; 0 if the images have the size of the crop already.
      local: Part of each global batch that this process evaluates.

    Raises:
      UserError: Too many images cannot be read, or an image has another size and `resize` is 0.
    """
    check_resize(size, resize)

    def load(batch: int, part: slice, outputs: list[np.ndarray]) -> None:
        crops, labels, indices = outputs
        crops[:], labels[:], indices[:] = 0, -1, -1
        first = batch * batch_size + local.start + part.start
        for i, index in enumerate(range(first, min(first + len(crops), len(reader)))):
            image, label = reader.read(index)
            if image is None:
                continue
            if not resize and image.shape[:2] != (size, size):
                raise errors.UserError(
                    f'image {reader.source.name(index)} is {image.shape[0]}x{image.shape[1]}; '
                    f'expected {size}x{size} (config.augment.size), because config.eval.resize is '
                    '0. Set config.eval.resize'
                )
            crops[i], labels[i], indices[i] = _center(image, size, resize), label, index

    outputs = [((size, size, reader.channels), np.uint8), ((), np.int64), ((), np.int64)]
    batches = range(math.ceil(len(reader) / batch_size))
    yield from _in_threads(load, batches, local.stop - local.start, outputs)


def _in_threads(
    load: Callable[[int, slice, list[np.ndarray]], None],
    batches: Iterable[int],
    batch_size: int,
    outputs: Sequence[tuple[tuple[int, ...], Any]],
) -> Iterator[Any]:
    """Yields each batch as a tuple of arrays, while threads load the next two.

    Args:
      load: Function (batch, part of it, arrays of the part to fill); it runs in threads.
      batches: Numbers of the batches.
      batch_size: Number of images in a batch.
      outputs: Shape and dtype of each array for one image.
    """
    threads = concurrent.futures.ThreadPoolExecutor(_cpus())
    number = math.ceil(batch_size / _IMAGES)
    edges = [batch_size * i // number for i in range(number + 1)]
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]

    def submit(batch: int) -> tuple[list[np.ndarray], list[concurrent.futures.Future[None]]]:
        arrays = [np.empty((batch_size, *shape), dtype) for shape, dtype in outputs]
        return arrays, [
            threads.submit(load, batch, part, [array[part] for array in arrays]) for part in parts
        ]

    try:
        later = iter(batches)
        queue = collections.deque(map(submit, itertools.islice(later, 3)))
        while queue:
            arrays, loading = queue.popleft()
            for part in loading:
                part.result()
            queue.extend(map(submit, itertools.islice(later, 1)))
            yield tuple(arrays)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _cpus() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _once(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Returns the function with a cache: one thread computes what many ask for."""
    lock, cached = threading.Lock(), functools.lru_cache(maxsize=16)(function)

    def locked(step: int) -> Any:
        with lock:
            return cached(step)

    return locked


def _center(image: np.ndarray, size: int, resize: int) -> np.ndarray:
    if resize:
        from simsiam_jax.data import geometry

        height, width, _ = image.shape
        short = min(height, width)
        rows, columns = resize * height // short, resize * width // short
        # Python rounds half to even, as torchvision does.
        top, left = round((rows - size) / 2), round((columns - size) / 2)
        image = geometry.resize_crop(image, rows, columns, top, left, size)
    return np.ascontiguousarray(image)
