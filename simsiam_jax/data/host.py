"""The input pipeline in tf.data: read, decode, crop, resize, colour; uint8 out."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from simsiam_jax import errors, tensorflow
from simsiam_jax.data import device, ops
from simsiam_jax.data.order import Order
from simsiam_jax.data.recipe import BLUR_RADIUS, Recipe, check_resize, crop_box, plan, sample
from simsiam_jax.data.sources import Source


def to_views(batch: Sequence[Any], recipes: Sequence[Recipe]) -> list[Any]:
    """The normalised views of a device batch of uint8 ones."""
    return [
        device.normalise(view, recipe.mean, recipe.std)
        for view, recipe in zip(batch, recipes, strict=True)
    ]


def train_batches(
    source: Source,
    order: Order,
    recipes: Sequence[Recipe],
    *,
    channels: int,
    start: int,
    stop: int,
    local: slice,
) -> Iterator[list[np.ndarray]]:
    """This process's share of the batches of steps [start, stop): uint8 [B, S, S, C] a view.

    Raises:
      UserError: an image cannot be read or decoded; it is named.
    """
    tf = tensorflow.load()
    _check_channels(channels)

    def images() -> Iterator[Any]:
        for step in range(start, stop):
            indices, views = plan(order, recipes, step, local)
            for b, index in enumerate(indices):
                yield index, tuple({k: v[b] for k, v in view.items()} for view in views)

    def spec(recipe: Recipe) -> dict[str, Any]:
        example = sample(recipe, np.random.default_rng(0), 1)
        return {k: tf.TensorSpec(v.shape[1:], v.dtype) for k, v in example.items()}

    def make_views(index: Any, params: Any) -> Any:
        image, _ = _read(tf, source, index, channels)
        return tuple(_view(tf, image, p, r) for p, r in zip(params, recipes, strict=True))

    signature = (tf.TensorSpec((), tf.int64), tuple(spec(recipe) for recipe in recipes))
    data = tf.data.Dataset.from_generator(images, output_signature=signature)
    data = _map(tf, data, make_views)
    data = data.batch(local.stop - local.start, drop_remainder=True).prefetch(2)
    steps = iter(range(start, stop))
    examine = functools.partial(_examine, tf, source, channels=channels)
    for batch in _checked(tf, data, lambda: order.indices(next(steps))[local], examine):
        yield list(batch)


def eval_batches(
    source: Source, *, batch_size: int, channels: int, size: int, resize: int, local: slice
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Centre crops uint8 [B, S, S, C] and labels [B] of every image, in order.

    The last batch is filled up with copies of the last image, labelled -1.

    Args:
      size: side of the crop.
      resize: the shorter side before the crop; 0: images have the crop's size already.

    Raises:
      UserError: an image cannot be read or decoded, or has another size and `resize` is 0; it
        is named.
    """
    tf = tensorflow.load()
    _check_channels(channels)
    check_resize(size, resize)
    batches = math.ceil(len(source) / batch_size)

    def prepare(index: Any) -> Any:
        image, label = _read(tf, source, tf.minimum(index, len(source) - 1), channels)
        if resize:
            shape = tf.shape(image)[:2]
            image = tf.image.resize(image, resize * shape // tf.reduce_min(shape), antialias=True)
            # Python's and TensorFlow's round agree: half to even, as torchvision's.
            corner = tf.cast(tf.round((tf.shape(image)[:2] - size) / 2), tf.int32)
            image = image[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
        image = tf.cast(tf.round(image), tf.uint8)
        image = tf.ensure_shape(image, (size, size, channels))
        return image, tf.where(index < len(source), label, -1)

    def positions() -> Iterator[int]:
        for batch in range(batches):
            yield from range(batch * batch_size, (batch + 1) * batch_size)[local]

    data = tf.data.Dataset.from_generator(positions, output_signature=tf.TensorSpec((), tf.int64))
    data = _map(tf, data, prepare)
    data = data.batch(local.stop - local.start).prefetch(2)
    starts = iter(range(0, batches * batch_size, batch_size))

    def indices() -> np.ndarray:
        return np.minimum((next(starts) + np.arange(batch_size))[local], len(source) - 1)

    examine = functools.partial(_examine, tf, source, channels=channels, size=0 if resize else size)
    yield from _checked(tf, data, indices, examine)


def _map(tf: Any, data: Any, function: Callable[..., Any]) -> Any:
    # No Python control flow hangs on a tensor, and AutoGraph is slow to find that out.
    function = tf.autograph.experimental.do_not_convert(function)
    return data.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3, 4):
        raise errors.UserError(
            f'config.data.channels is {channels}; image files are read as 1 (gray), 3 (RGB) or '
            '4 (with alpha)'
        )


def _checked(
    tf: Any,
    data: Any,
    next_indices: Callable[[], np.ndarray],
    examine: Callable[[int], None],
) -> Iterator[Any]:
    """The batches of `data`; where one fails, the image at fault is looked up and named.

    `next_indices` gives the images of one batch after the other; `examine` raises UserError for
    one at fault.
    """
    iterator = data.as_numpy_iterator()
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError:
            for index in next_indices():
                examine(int(index))
            raise
        next_indices()
        yield batch


def _examine(tf: Any, source: Source, index: int, *, channels: int, size: int = 0) -> None:
    """Raises UserError where the image cannot be had, or is not `size` x `size`."""
    try:
        height, width, _ = _decode(tf, source.read(index)[0], channels).shape
    except Exception as error:  # its batch has failed, so whatever this is, it is the reason
        line = (str(getattr(error, 'message', error)) or type(error).__name__).splitlines()[0]
        raise errors.UserError(
            f'cannot read image {source.name(index)}: {line}; mend it or take it out of the source'
        ) from error
    if size and (height, width) != (size, size):
        raise errors.UserError(
            f'image {source.name(index)} is {height}x{width}, config.augment.size is {size} and '
            'config.eval.resize 0 (no resize); set config.eval.resize'
        )


def _read(tf: Any, source: Source, index: Any, channels: int) -> tuple[Any, Any]:
    """A decoded image, float32 [H, W, C] in 0..255, and its label."""
    encoded, label = tf.numpy_function(
        lambda i: _labelled(source, int(i)), [index], (tf.string, tf.int64), stateful=False
    )
    label = tf.ensure_shape(label, ())
    return tf.cast(_decode(tf, tf.ensure_shape(encoded, ()), channels), tf.float32), label


def _labelled(source: Source, index: int) -> tuple[bytes, np.int64]:
    encoded, label = source.read(index)
    return encoded, np.int64(label)


def _decode(tf: Any, encoded: Any, channels: int) -> Any:
    image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
    return tf.ensure_shape(image, (None, None, channels))


def _view(tf: Any, image: Any, params: dict[str, Any], recipe: Recipe) -> Any:
    """One uint8 view; the same operations as data.device, in the same order."""
    x = image / 255
    if recipe.rotation:
        x = rotate(tf, x, params['angle'])
    shape = tf.cast(tf.shape(x), tf.float32)
    box = crop_box(params, shape[0], shape[1], recipe.crop_ratio, tf)
    x = crop_resize(tf, x, box, recipe.size)
    if recipe.jitter:
        x = jitter(tf, x, params['factors'], params['order'])
    if recipe.gray:
        x = tf.where(params['gray'], ops.gray(x), x)
    if recipe.blur:
        x = tf.cond(params['sigma'] > 0, lambda: blur(tf, x, params['sigma']), lambda: x)
    x = tf.where(params['flip'], x[:, ::-1], x)
    return tf.ensure_shape(
        tf.cast(tf.round(x * 255), tf.uint8), (recipe.size, recipe.size, image.shape[-1])
    )


def rotate(tf: Any, x: Any, angle: Any) -> Any:
    """Turned about the centre by `angle` radians, bilinear, zero outside."""
    size = tf.cast(tf.shape(x)[:2] - 1, tf.float32) / 2
    y0, x0 = size[0], size[1]
    cos, sin = tf.cos(angle), tf.sin(angle)
    row = [cos, sin, x0 - cos * x0 - sin * y0, -sin, cos, y0 + sin * x0 - cos * y0, 0.0, 0.0]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x[None],
        transforms=tf.stack(row)[None],
        output_shape=tf.shape(x)[:2],
        fill_value=0.0,
        interpolation='BILINEAR',
        fill_mode='CONSTANT',
    )[0]


def crop_resize(tf: Any, x: Any, box: tuple[Any, Any, Any, Any], size: int) -> Any:
    """The crop (top, left, height, width), resized bilinearly with antialiasing."""
    top, left, height, width = (tf.cast(edge, tf.int32) for edge in box)
    crop = x[top : top + height, left : left + width]
    return tf.image.resize(crop, (size, size), antialias=True)


def jitter(tf: Any, x: Any, factors: Any, order: Any) -> Any:
    """Brightness, contrast, saturation and hue by `factors`, in the given order."""
    brightness, contrast, saturation, hue = tf.unstack(factors)
    colour = x.shape[-1] == 3

    def operations(x: Any) -> list[Any]:
        return [
            lambda: ops.blend(x, 0.0, brightness, tf),
            lambda: ops.blend(x, tf.reduce_mean(ops.gray(x)), contrast, tf),
            lambda: ops.blend(x, ops.gray(x), saturation, tf) if colour else x,
            lambda: ops.shift_hue(x, hue, tf) if colour else x,
        ]

    for turn in range(4):
        x = tf.switch_case(order[turn], operations(x))
    return x


def blur(tf: Any, x: Any, sigma: Any) -> Any:
    """Gaussian blur of 13 taps, reflected at the border; sigma 0 leaves the image as it is."""
    taps = tf.range(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=tf.float32)
    kernel = tf.exp(-0.5 * tf.square(taps / tf.maximum(sigma, 1e-2)))
    kernel = kernel / tf.reduce_sum(kernel)
    channels = x.shape[-1]
    for axis in (0, 1):
        pad = [[BLUR_RADIUS] * 2 if a == axis else [0, 0] for a in range(3)]
        padded = tf.pad(x, pad, mode='REFLECT')
        shape = (13, 1, 1, 1) if axis == 0 else (1, 13, 1, 1)
        weights = tf.tile(tf.reshape(kernel, shape), (1, 1, channels, 1))
        x = tf.nn.depthwise_conv2d(padded[None], weights, (1, 1, 1, 1), 'VALID')[0]
    return x
