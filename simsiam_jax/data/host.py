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

    def load(position: np.int64) -> tuple[Any, ...]:
        step, b = divmod(int(position), batch_size)
        indices, views = batch_params(step)
        image, label = reader.example(int(indices[b]))
        params = [{k: v[b] for k, v in view.items()} for view in views]
        return np.int64(label), *stage.load(image, params)

    shapes, dtypes = zip(((), np.int64), *stage.outputs(), strict=True)
    load_or_blank = _unless_error(load, tuple(map(np.zeros, shapes, dtypes)))

    def make(position: Any) -> Any:
        arrays = tf.numpy_function(load_or_blank, [position], dtypes, stateful=False)
        label, *arrays = map(tf.ensure_shape, arrays, shapes)
        return label, *stage.finish(tf, arrays)

    data = tf.data.Dataset.range(start * batch_size, stop * batch_size)
    data = _batched(tf, data, make, batch_size)
    for step, (label, *arrays) in enumerate(_checked(data, reader, stop - start), start):
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
    tf = lazy_tf.load()
    check_resize(size, resize)
    batches = math.ceil(len(reader) / batch_size)
    black = np.zeros((size, size, reader.channels), np.uint8)
    blank = black, np.int64(-1), np.int64(-1)

    def load(index: np.int64) -> tuple[np.ndarray, np.int64, np.int64]:
        if index >= len(reader):
            return blank
        image, label = reader.read(int(index))
        if image is None:
            return blank
        if not resize and image.shape[:2] != (size, size):
            reader.error = errors.UserError(
                f'image {reader.source.name(int(index))} is {image.shape[0]}x{image.shape[1]}; '
                f'expected {size}x{size} (config.augment.size), because config.eval.resize is 0. '
                'Set config.eval.resize'
            )
            raise reader.error
        return _center(image, size, resize), np.int64(label), index

    load_or_blank = _unless_error(load, blank)

    def make(index: Any) -> Any:
        types = (tf.uint8, tf.int64, tf.int64)
        arrays = tf.numpy_function(load_or_blank, [index], types, stateful=False)
        return tuple(map(tf.ensure_shape, arrays, (black.shape, (), ())))

    def positions() -> np.ndarray:
        return np.arange(batches * batch_size).reshape(batches, batch_size)[:, local].ravel()

    data = tf.data.Dataset.from_tensor_slices(positions())
    yield from _checked(_batched(tf, data, make, local.stop - local.start), reader, batches)


def _batched(tf: Any, data: Any, function: Callable[..., Any], batch_size: int) -> Any:
    # No Python control flow depends on a tensor, and AutoGraph takes long to find that out.
    function = tf.autograph.experimental.do_not_convert(function)
    data = data.map(function, num_parallel_calls=_cpus(), deterministic=True)
    options = tf.data.Options()
    # The thread that tunes the number of calls can hold up the end of the data for seconds.
    options.autotune.enabled = False
    return data.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)


def _cpus() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _unless_error(load: Callable[[Any], Any], blank: Any) -> Callable[[Any], Any]:
    """Returns `load` with `blank` in place of a UserError, whose traceback TensorFlow would print.

    _checked raises the error, which is in reader.error.
    """

    def load_or_blank(position: Any) -> Any:
        try:
            return load(position)
        except errors.UserError:
            return blank

    return load_or_blank


def _checked(data: Any, reader: Reader, count: int) -> Iterator[Any]:
    for arrays in itertools.islice(data.as_numpy_iterator(), count):
        if reader.error:
            raise reader.error
        yield arrays


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
