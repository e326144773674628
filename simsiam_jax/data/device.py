"""The augmentation batched in JAX, for use inside the training step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from simsiam_jax.data import ops
from simsiam_jax.data.recipe import BLUR_RADIUS, Recipe, crop_box

Image = Float[Array, 'H W C']


def normalise(
    images: Num[Array, 'B H W C'], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, 'B H W C']:
    """uint8 images, or float ones in [0, 1], with mean and std by channel taken out."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def augment(
    images: UInt8[Array, 'B H W C'],
    params: dict[str, Array],
    recipe: Recipe,
    sizes: Float[Array, 'B 2'] | None = None,
) -> Float[Array, 'B S S C']:
    """A normalised view of each image, by the parameters that recipe.sample gave.

    With `sizes`, an image is what lies within its (height, width) from the upper left corner.
    """
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.float32), (len(images), 2))

    def crop(image: Array, size: Array, params: dict[str, Array]) -> Array:
        x, (height, width) = image.astype(jnp.float32) / 255, size
        if recipe.rotation:
            x = rotate(x, params['angle'], height, width)
        return crop_resize(x, crop_box(params, height, width, recipe.crop_ratio, jnp), recipe.size)

    return _finish(jax.vmap(crop)(images, sizes, params), params, recipe)


def colour(
    crops: UInt8[Array, 'B S S C'], params: dict[str, Array], recipe: Recipe
) -> Float[Array, 'B S S C']:
    """A normalised view of each crop: `augment` where the host has made the crops."""
    return _finish(crops.astype(jnp.float32) / 255, params, recipe)


def _finish(
    x: Float[Array, 'B S S C'], params: dict[str, Array], recipe: Recipe
) -> Float[Array, 'B S S C']:
    views = jax.vmap(functools.partial(_colour, recipe=recipe))(x, params)
    return normalise(views, recipe.mean, recipe.std)


def centre(
    images: UInt8[Array | np.ndarray, 'B H W C'], size: int, resize: int
) -> Float[Array, 'B S S C']:
    """The centre crop of `size` after the shorter side became `resize`; values in [0, 1].

    `resize` 0 leaves the images as they are.
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


def _colour(x: Image, params: dict[str, Array], *, recipe: Recipe) -> Image:
    if recipe.jitter:
        x = jitter(x, params['factors'], params['order'])
    if recipe.gray:
        x = jnp.where(params['gray'], ops.gray(x, jnp), x)
    if recipe.blur:
        x = blur(x, params['sigma'])
    if recipe.solarise:
        x = jnp.where(params['solarise'], ops.solarise(x, jnp), x)
    return jnp.where(params['flip'], x[:, ::-1], x)


def rotate(x: Image, angle: Float[Array, ''], height: Any, width: Any) -> Image:
    """Turned about the centre of `height` x `width` by `angle` radians, bilinear, zero outside."""
    y0, x0 = (height - 1) / 2, (width - 1) / 2
    dy, dx = jnp.arange(x.shape[0])[:, None] - y0, jnp.arange(x.shape[1])[None] - x0
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    coordinates = [y0 + cos * dy - sin * dx, x0 + sin * dy + cos * dx]
    sampled = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=coordinates, order=1)
    return jax.vmap(sampled, in_axes=-1, out_axes=-1)(x)


def resize_weights(start: Any, length: Any, size: int, pixels: int) -> Float[Array, 'size pixels']:
    """Rows that resize pixels [start, start + length) to `size` ones.

    Bilinear, antialiased where it shrinks, as PIL and torchvision do: a triangle of half-width
    max(1, scale), cut at the crop's borders and normalised.
    """
    scale = length / size
    centres = start + (jnp.arange(size) + 0.5) * scale
    places = jnp.arange(pixels) + 0.5
    distance = jnp.abs(places[None] - centres[:, None]) / jnp.maximum(scale, 1.0)
    inside = (places > start) & (places < start + length)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
    return weights / weights.sum(1, keepdims=True)


def crop_resize(x: Image, box: tuple[Any, Any, Any, Any], size: int) -> Float[Array, 'size size C']:
    """The crop (top, left, height, width), resized, as one product along each axis."""
    top, left, height, width = box
    rows = resize_weights(top, height, size, x.shape[0])
    columns = resize_weights(left, width, size, x.shape[1])
    # Full float32 also where the matrix units would round the factors to bfloat16 or TF32.
    return jnp.einsum('hwc,yh,xw->yxc', x, rows, columns, precision='highest')


def jitter(x: Image, factors: Float[Array, '4'], order: Num[Array, '4']) -> Image:
    """Brightness, contrast, saturation and hue by `factors`, in the given order."""
    brightness, contrast, saturation, hue = factors
    colour = x.shape[-1] == 3
    operations = [
        lambda x: ops.blend(x, 0.0, brightness, jnp),
        lambda x: ops.blend(x, ops.gray(x, jnp).mean(), contrast, jnp),
        lambda x: ops.blend(x, ops.gray(x, jnp), saturation, jnp) if colour else x,
        lambda x: ops.shift_hue(x, hue, jnp) if colour else x,
    ]
    for turn in range(4):
        x = jax.lax.switch(order[turn], operations, x)
    return x


def blur(x: Image, sigma: Float[Array, '']) -> Image:
    """Gaussian blur of 13 taps, reflected at the border; sigma 0 leaves the image as it is."""
    taps = jnp.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel = jnp.exp(-0.5 * jnp.square(taps / jnp.maximum(sigma, 1e-2)))
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        pad = [(BLUR_RADIUS, BLUR_RADIUS) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(x, pad, mode='reflect')
        shifted = (
            kernel[i] * jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
            for i in range(len(taps))
        )
        x = functools.reduce(jnp.add, shifted)
    return x
