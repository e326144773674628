"""The input pipeline on the host: tf.data over compiled decoding, cropping and resizing."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from simsiam_jax import errors, lazy_tf
from simsiam_jax.data import jax_augment, tf_augment
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe, check_resize, crop_box, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler

# What is left to the device: nothing but the normalization, the color operations with blur and
# flip, or the crops too.
ON_DEVICE = ('none', 'color', 'all')


def to_views(batch: dict[str, Any], recipes: Sequence[Recipe]) -> list[Any]:
    """The normalized views of a device batch, whatever part of them is left to the device."""
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
    """This process's share of the batches of steps [start, stop), for `to_views`.

    They hold 'index' and 'label', int64 [B], the label -1 where there is none. With `on_device`
    'none' or 'color' they hold 'crops', a uint8 [B, S, S, C] a view; with 'color' also 'views',
    the parameters; with 'all' instead of the crops 'image', uint8 [B, canvas, canvas, C], the
    images in its upper left corners, and 'size', their heights and widths; larger images are
    shrunk to the canvas.

    Raises:
      UserError: too many images cannot be read.
    """
    tf = lazy_tf.load()
    batch_size = local.stop - local.start
    steps = _once(lambda step: sample_batch_params(sampler, recipes, step, local))

    def load(position: np.int64) -> tuple[Any, ...]:
        step, b = divmod(int(position), batch_size)
        indices, views = steps(step)
        image, label = reader.example(int(indices[b]))
        if on_device == 'all':
            return np.int64(label), *_on_canvas(image, canvas)
        crops = [
            _crop(image, {k: v[b] for k, v in params.items()}, recipe)
            for params, recipe in zip(views, recipes, strict=True)
        ]
        if on_device == 'color':
            return np.int64(label), *crops
        return (
            np.int64(label),
            *crops,
            *(tf_augment.pack({k: v[b] for k, v in p.items()}) for p in views),
        )

    shapes: list[tuple[int, ...]] = [(), *((r.size, r.size, reader.channels) for r in recipes)]
    types = [tf.int64, *[tf.uint8] * len(recipes)]
    if on_device == 'all':
        shapes = [(), (canvas, canvas, reader.channels), (2,)]
        types = [tf.int64, tf.uint8, tf.float32]
    elif on_device == 'none':
        shapes += [(tf_augment.PACKED,)] * len(recipes)
        types += [tf.float32] * len(recipes)

    blank = tuple(np.zeros(s, t.as_numpy_dtype) for s, t in zip(shapes, types, strict=True))
    load_or_blank = _unless_error(load, blank)

    def make(position: Any) -> Any:
        arrays = tf.numpy_function(load_or_blank, [position], types, stateful=False)
        arrays = [tf.ensure_shape(a, s) for a, s in zip(arrays, shapes, strict=True)]
        if on_device != 'none':
            return tuple(arrays)
        label, crops, packed = arrays[0], arrays[1 : len(recipes) + 1], arrays[len(recipes) + 1 :]
        return label, *(
            tf_augment.color(tf, crop, parameters, recipe)
            for crop, parameters, recipe in zip(crops, packed, recipes, strict=True)
        )

    data = tf.data.Dataset.range(start * batch_size, stop * batch_size)
    data = _batched(tf, data, make, batch_size)
    for step, (label, *arrays) in enumerate(_checked(data, reader), start):
        common = {'index': steps(step)[0], 'label': label}
        if on_device == 'none':
            yield common | {'crops': arrays}
        elif on_device == 'color':
            yield common | {'crops': arrays, 'views': steps(step)[1]}
        else:
            image, size = arrays
            yield common | {'image': image, 'size': size, 'views': steps(step)[1]}


def eval_batches(
    reader: Reader, *, batch_size: int, size: int, resize: int, local: slice
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Center crops uint8 [B, S, S, C], labels [B] and indices [B] of every image, in order.

    Images that cannot be read, and what fills up the last batch, are black and have index -1.

    Args:
      size: side of the crop.
      resize: the shorter side before the crop; 0: images have the crop's size already.

    Raises:
      UserError: too many images cannot be read, or one has another size and `resize` is 0.
    """
    tf = lazy_tf.load()
    check_resize(size, resize)
    batches = math.ceil(len(reader) / batch_size)
    black = np.zeros((size, size, reader.channels), np.uint8)
    none = black, np.int64(-1), np.int64(-1)

    def load(index: np.int64) -> tuple[np.ndarray, np.int64, np.int64]:
        if index >= len(reader):
            return none
        image, label = reader.read(int(index))
        if image is None:
            return none
        if not resize and image.shape[:2] != (size, size):
            reader.error = errors.UserError(
                f'image {reader.source.name(int(index))} is {image.shape[0]}x{image.shape[1]}, '
                f'config.augment.size is {size} and config.eval.resize 0 (no resize); set '
                'config.eval.resize'
            )
            raise reader.error
        return _center(image, size, resize), np.int64(label), index

    load_or_blank = _unless_error(load, none)

    def make(index: Any) -> Any:
        types = (tf.uint8, tf.int64, tf.int64)
        arrays = tf.numpy_function(load_or_blank, [index], types, stateful=False)
        return tuple(map(tf.ensure_shape, arrays, (black.shape, (), ())))

    def positions() -> np.ndarray:
        return np.arange(batches * batch_size).reshape(batches, batch_size)[:, local].ravel()

    data = tf.data.Dataset.from_tensor_slices(positions())
    yield from _checked(_batched(tf, data, make, local.stop - local.start), reader)


def _batched(tf: Any, data: Any, function: Callable[..., Any], batch_size: int) -> Any:
    # No Python control flow hangs on a tensor, and AutoGraph is slow to find that out.
    function = tf.autograph.experimental.do_not_convert(function)
    data = data.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return data.batch(batch_size, drop_remainder=True).prefetch(2)


def _unless_error(load: Callable[[Any], Any], blank: Any) -> Callable[[Any], Any]:
    """`load`, with `blank` for what it raises: reader.error ends the run, see _checked.

    TensorFlow would print the traceback.
    """

    def load_or_blank(position: Any) -> Any:
        try:
            return load(position)
        except errors.UserError:
            return blank

    return load_or_blank


def _checked(data: Any, reader: Reader) -> Iterator[Any]:
    for arrays in data.as_numpy_iterator():
        if reader.error:
            raise reader.error
        yield arrays


def _once(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Remembers the last results; one thread makes what many ask for."""
    lock, cached = threading.Lock(), functools.lru_cache(maxsize=16)(function)

    def locked(step: int) -> Any:
        with lock:
            return cached(step)

    return locked


def _crop(image: np.ndarray, params: dict[str, Any], recipe: Recipe) -> np.ndarray:
    from simsiam_jax.data import geometry  # numba is for images that are read, not resident ones

    if recipe.rotation:
        image = geometry.rotate(image, float(params['angle']))
    shape = np.float32(image.shape[0]), np.float32(image.shape[1])
    box = crop_box(params, *shape, recipe.crop_ratio, np)
    top, left, height, width = (int(edge) for edge in box)
    return geometry.crop_resize(image, top, left, height, width, recipe.size, recipe.size)


def _on_canvas(image: np.ndarray, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels = image.shape
    if max(height, width) > canvas:
        from simsiam_jax.data import geometry

        scale = canvas / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = geometry.crop_resize(image, 0, 0, height, width, shape[0], shape[1])
    out = np.zeros((canvas, canvas, channels), np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    return out, np.array(image.shape[:2], np.float32)


def _center(image: np.ndarray, size: int, resize: int) -> np.ndarray:
    if resize:
        from simsiam_jax.data import geometry

        height, width, _ = image.shape
        short = min(height, width)
        rows, columns = resize * height // short, resize * width // short
        image = geometry.crop_resize(image, 0, 0, height, width, rows, columns)
        # Python rounds half to even, as torchvision does.
        top, left = round((rows - size) / 2), round((columns - size) / 2)
        image = image[top : top + size, left : left + size]
    return np.ascontiguousarray(image)
