"""The input pipeline on the host: tf.data over compiled decoding, cropping and resizing."""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from simsiam_jax import errors, lazy_tf
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
    tf = lazy_tf.load()
    stage = host_stage.make_stage(on_device, recipes, channels=reader.channels, canvas=canvas)
    batch_size = local.stop - local.start
    batch_params = _once(lambda step: sample_batch_params(sampler, recipes, step, local))

    def load(step: int, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        indices, views = batch_params(step)
        images, labels = zip(*map(reader.example, indices[positions].tolist()), strict=True)
        params = [{k: v[positions] for k, v in view.items()} for view in views]
        return np.array(labels, np.int64), *stage.load(list(images), params)

    outputs = [((), np.int64), *stage.outputs()]
    data = _mapped(tf, reader, load, outputs, start, stop, batch_size, stage.finish)
    for step, (label, *arrays) in enumerate(data, start):
        yield {'index': batch_params(step)[0], 'label': label} | stage.assemble(
            arrays, batch_params(step)[1]
        )


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
    tf = lazy_tf.load()
    check_resize(size, resize)
    batches = math.ceil(len(reader) / batch_size)

    def load(step: int, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        crops = np.zeros((len(positions), size, size, reader.channels), np.uint8)
        labels, indices = np.full((2, len(positions)), -1)
        for i, index in enumerate((step * batch_size + local.start + positions).tolist()):
            image, label = reader.read(index) if index < len(reader) else (None, -1)
            if image is None:
                continue
            if not resize and image.shape[:2] != (size, size):
                reader.error = errors.UserError(
                    f'image {reader.source.name(index)} is {image.shape[0]}x{image.shape[1]}; '
                    f'expected {size}x{size} (config.augment.size), because config.eval.resize is '
                    '0. Set config.eval.resize'
                )
                raise reader.error
            crops[i], labels[i], indices[i] = _center(image, size, resize), label, index
        return crops, labels, indices

    outputs = [((size, size, reader.channels), np.uint8), ((), np.int64), ((), np.int64)]
    yield from _mapped(tf, reader, load, outputs, 0, batches, local.stop - local.start)


def _mapped(
    tf: Any,
    reader: Reader,
    load: Callable[[int, np.ndarray], tuple[np.ndarray, ...]],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    start: int,
    stop: int,
    batch_size: int,
    finish: Callable[[Any, list[Any]], list[Any]] | None = None,
) -> Iterator[Any]:
    """Yields the arrays of each batch, which are loaded in parallel.

    Args:
      tf: TensorFlow.
      reader: Its error is raised where TensorFlow cannot hide it.
      load: Function (step, positions in the batch [n]) -> arrays [n, ...].
      outputs: Shape of an image's part, and dtype, of each array.
      start: First step.
      stop: Step after the last.
      batch_size: Images of a batch.
      finish: Function (TensorFlow, all arrays but the first) -> what it makes of them.
    """
    parts = math.ceil(batch_size / _IMAGES)
    length = math.ceil(batch_size / parts)
    shapes, dtypes = [(length, *shape) for shape, _ in outputs], [dtype for _, dtype in outputs]
    blank = tuple(np.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))

    def load_or_blank(position: np.int64) -> tuple[np.ndarray, ...]:
        step, part = divmod(int(position), parts)
        # The last part repeats an image: TensorFlow batches parts of equal length.
        positions = np.minimum(part * length + np.arange(length), batch_size - 1)
        try:
            return load(step, positions)
        except errors.UserError:  # in reader.error; TensorFlow would print its traceback
            return blank

    # No Python control flow depends on a tensor, and AutoGraph takes long to find that out.
    @tf.autograph.experimental.do_not_convert
    def make(position: Any) -> Any:
        arrays = tf.numpy_function(load_or_blank, [position], dtypes, stateful=False)
        first, *rest = map(tf.ensure_shape, arrays, shapes)
        return first, *(finish(tf, rest) if finish else rest)

    data = tf.data.Dataset.range(start * parts, stop * parts)
    data = data.map(make, num_parallel_calls=_cpus(), deterministic=True)
    options = tf.data.Options()
    # The thread that tunes the number of calls can hold up the end of the data for seconds.
    options.autotune.enabled = False
    data = data.batch(parts, drop_remainder=True).prefetch(2).with_options(options)
    for arrays in itertools.islice(data.as_numpy_iterator(), stop - start):
        if reader.error:
            raise reader.error
        yield tuple(x.reshape(-1, *x.shape[2:])[:batch_size] for x in arrays)


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
