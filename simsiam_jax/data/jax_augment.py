"""Batched augmentation in JAX, for use inside the training step."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from simsiam_jax.data import ops
from simsiam_jax.data.recipe import BLUR_RADIUS, Recipe, crop_box

Image = Float[Array, 'H W C']
# An image, one array for each channel.
Planes = Sequence[Float[Array, 'H W']]

_CHUNK = 8  # images that a CPU colors at a time


def normalize(
    images: Num[Array, 'B H W C'], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, 'B H W C']:
    """Normalizes uint8 images, or float images in [0, 1], by mean and std of each channel."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def augment(
    images: UInt8[Array, 'B H W C'],
    params: dict[str, Array],
    recipe: Recipe,
    sizes: Float[Array, 'B 2'] | None = None,
) -> Float[Array, 'B S S C']:
    """Returns a normalized view of each image, with parameters from recipe.sample.

    `sizes` are (height, width) of images padded at the bottom and right; None: no padding.
    """
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.float32), (len(images), 2))

    def crop(image: Array, size: Array, params: dict[str, Array]) -> Array:
        x, (height, width) = image.astype(jnp.float32) / 255, size
        if recipe.rotation:
            x = rotate(x, params['angle'], height, width)
        return crop_resize(x, crop_box(params, height, width, recipe.crop_ratio, jnp), recipe.size)

    return _finish(jax.vmap(crop)(images, sizes, params), params, recipe)


def color(
    crops: UInt8[Array, 'B S S C'], params: dict[str, Array], recipe: Recipe
) -> Float[Array, 'B S S C']:
    """Returns a normalized view of each crop: `augment` without its crop, which the host did."""
    return _finish(crops, params, recipe)


def _finish(
    x: Num[Array, 'B S S C'], params: dict[str, Array], recipe: Recipe
) -> Float[Array, 'B S S C']:
    # The flip comes first, while the images are bytes: no other operation depends on direction.
    x = jnp.where(params['flip'][:, None, None, None], x[:, :, ::-1], x)
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.float32) / 255
    planes = jnp.unstack(x, axis=-1)
    color = functools.partial(_color, recipe=recipe)

    def by_chunks(*batch: Any) -> Any:
        return jax.lax.map(lambda image: color(*image), batch, batch_size=_CHUNK)

    # XLA for CPUs would compute all colors again for each channel of the stack. A loop stores them.
    views = jax.lax.platform_dependent(planes, params, cpu=by_chunks, default=jax.vmap(color))
    return normalize(jnp.stack(views, -1), recipe.mean, recipe.std)


def center(
    images: UInt8[Array | np.ndarray, 'B H W C'], size: int, resize: int
) -> Float[Array, 'B S S C']:
    """Resizes the shorter side to `resize` and crops the center `size`; values in [0, 1].

    `resize` 0 returns the whole images.
    """
    x = jnp.asarray(images, jnp.float32) / 255
    if not resize:
        return x
    height, width = x.shape[1:3]
    short = min(height, width)

    def weights(length: int) -> Array:
        resized = resize * length // short
        start = round((resized - size) / 2)
        return resize_weights(0.0, float(length), resized, length)[start : start + size]

    return jnp.einsum('bhwc,yh,xw->byxc', x, weights(height), weights(width), precision='highest')


def _color(planes: Planes, params: dict[str, Array], *, recipe: Recipe) -> Planes:
    if recipe.jitter:
        planes = jitter(planes, params['factors'], params['order'])
    if recipe.gray:
        pairs = zip(ops.gray(planes), planes, strict=True)
        planes = [jnp.where(params['gray'], gray, x) for gray, x in pairs]
    if recipe.blur:
        planes = blur(planes, params['sigma'])
    if recipe.solarize:
        planes = [jnp.where(params['solarize'], ops.solarize(x, jnp), x) for x in planes]
    return planes


def rotate(x: Image, angle: Float[Array, ''], height: Any, width: Any) -> Image:
    """Rotates about the center of `height` x `width` by `angle` radians, bilinear, zero outside."""
    y0, x0 = (height - 1) / 2, (width - 1) / 2
    dy, dx = jnp.arange(x.shape[0])[:, None] - y0, jnp.arange(x.shape[1])[None] - x0
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    coordinates = [y0 + cos * dy - sin * dx, x0 + sin * dy + cos * dx]
    sampled = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=coordinates, order=1)
    return jax.vmap(sampled, in_axes=-1, out_axes=-1)(x)


def resize_weights(start: Any, length: Any, size: int, pixels: int) -> Float[Array, 'size pixels']:
    """Returns the matrix that resizes pixels [start, start + length) to `size` pixels.

    Bilinear, and antialiased if it shrinks, as PIL and torchvision: a triangle of half-width
    max(1, scale), cut at the crop's borders and normalized.
    """
    scale = length / size
    centers = start + (jnp.arange(size) + 0.5) * scale
    places = jnp.arange(pixels) + 0.5
    distance = jnp.abs(places[None] - centers[:, None]) / jnp.maximum(scale, 1.0)
    inside = (places > start) & (places < start + length)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
    return weights / weights.sum(1, keepdims=True)


def crop_resize(x: Image, box: tuple[Any, Any, Any, Any], size: int) -> Float[Array, 'size size C']:
    """Resizes the crop (top, left, height, width) by one matrix product along each axis."""
    top, left, height, width = box
    rows = resize_weights(top, height, size, x.shape[0])
    columns = resize_weights(left, width, size, x.shape[1])
    # Full float32: matrix units would round the factors to bfloat16 or TF32.
    return jnp.einsum('hwc,yh,xw->yxc', x, rows, columns, precision='highest')


def jitter(planes: Planes, factors: Float[Array, '4'], order: Num[Array, '4']) -> Planes:
    """Changes brightness, contrast, saturation and hue by `factors`, in the given order.

    No turn selects between images, because each selection would take a pass over memory. All
    operations but the hue are blends, whose references differ by two numbers; a blend that is not
    due has the factor 1.
    """
    turns, rgb = jnp.arange(4), len(planes) == 3
    contrast, hue = jnp.argmax(order == 1), jnp.argmax(order == 3)
    saturates = (order == 2).astype(jnp.float32)
    in_order = (factors if rgb else factors.at[2].set(1.0))[order]

    def pass_through(due: Array, mean: Any) -> tuple[Planes, Planes]:
        """Returns the images (before the hue, at the end) after the blends that are due."""

        def blend(x: Planes, turn: int, here: Array) -> Planes:
            reference = saturates[turn] * ops.luminance(x) + (turn == contrast) * mean
            factor = jnp.where(here & due[turn], in_order[turn], 1.0)
            return [ops.blend(plane, reference, factor, jnp) for plane in x]

        before = planes
        for turn in range(3):
            before = blend(before, turn, turn < hue)
        after = ops.shift_hue(before, factors[3], jnp) if rgb else before
        for turn in range(1, 4):
            after = blend(after, turn, turn > hue)
        return before, after

    before, after = pass_through(turns < contrast, 0.0)
    mean = jnp.where(contrast < hue, ops.luminance(before), ops.luminance(after)).mean()
    return pass_through(turns < 4, mean)[1]


def blur(planes: Planes, sigma: Float[Array, '']) -> Planes:
    """Applies a Gaussian blur of 13 taps, reflected at the border; sigma 0 changes nothing."""
    taps = jnp.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel = jnp.exp(-0.5 * jnp.square(taps / jnp.maximum(sigma, 1e-2)))
    # GPUs sum shifted images in one pass for each axis; TPUs would need many passes.
    blurs = {'cuda': blur_by_taps, 'rocm': blur_by_taps, 'default': blur_by_products}
    return jax.lax.platform_dependent(planes, kernel / kernel.sum(), **blurs)


def blur_by_taps(planes: Planes, kernel: Float[Array, 'K']) -> Planes:
    """Correlates with the kernel along both axes, as a sum of shifted images."""
    for axis in (0, 1):
        places = _reflected(planes[0].shape[axis], len(kernel))
        planes = [
            sum(
                weight * plane.take(place, axis, mode='clip')
                for weight, place in zip(kernel, places, strict=True)
            )
            for plane in planes
        ]
    return planes


def blur_by_products(planes: Planes, kernel: Float[Array, 'K']) -> Planes:
    """Correlates with the kernel along both axes, as products with a band matrix."""

    def band(length: int) -> Array:
        places = _reflected(length, len(kernel))[..., None] == np.arange(length)
        return sum(weight * place for weight, place in zip(kernel, places, strict=True))

    rows, columns = map(band, planes[0].shape)
    return [
        jnp.einsum('hw,yh,xw->yx', plane, rows, columns, precision='highest') for plane in planes
    ]


def _reflected(length: int, taps: int) -> np.ndarray:
    """Returns [taps, length]: the pixel that each tap of each pixel reads."""
    padded = np.pad(np.arange(length), taps // 2, mode='reflect')
    return np.lib.stride_tricks.sliding_window_view(padded, length)
