"""Color operations, blur and flip in TensorFlow, compiled; images are [C, H, W] here.

XLA is several times faster on a CPU if the color planes are separate.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from simsiam_jax.data import ops
from simsiam_jax.data.recipe import BLUR_RADIUS, Recipe

PACKED = 12


def pack(params: dict[str, Any]) -> np.ndarray:
    """Packs the color parameters of views as float32 [..., PACKED]."""
    rest = [params[key] for key in ('gray', 'sigma', 'flip', 'solarize')]
    parts = [params['factors'], params['order'], np.stack(rest, -1)]
    return np.concatenate(parts, -1).astype(np.float32)


def color(tf: Any, crop: Any, packed: Any, recipe: Recipe) -> Any:
    """Returns the uint8 view [S, S, C] of a uint8 crop; the operations of jax_augment.color."""
    return _compiled(tf, recipe)(crop, packed)


def color_views(tf: Any, recipes: Sequence[Recipe]) -> Any:
    """Returns a function (crops, packed parameters) -> views, with `color` for each recipe.

    Both are lists of an array [n, ...] for each recipe. One traced call computes all views of n
    images, because each call from Python takes a share of a millisecond.
    """

    @tf.function(autograph=False)
    def views(crops: list[Any], packed: list[Any]) -> list[Any]:
        return [
            tf.stack([color(tf, x[i], p[i], recipe) for i in range(x.shape[0])])
            for x, p, recipe in zip(crops, packed, recipes, strict=True)
        ]

    def on_host(crops: list[np.ndarray], packed: list[np.ndarray]) -> list[np.ndarray]:
        made = views(list(map(tf.constant, crops)), list(map(tf.constant, packed)))
        return [x.numpy() for x in made]

    return on_host


@functools.cache  # equal recipes compile once, which takes seconds
def _compiled(tf: Any, recipe: Recipe) -> Any:
    @tf.function(jit_compile=True, autograph=False)
    def compiled(crop: Any, packed: Any) -> Any:
        x = tf.cast(tf.transpose(crop, (2, 0, 1)), tf.float32) / 255
        if recipe.jitter:
            x = jitter(tf, x, packed[:4], tf.cast(packed[4:8], tf.int32))
        if recipe.gray:
            x = tf.cond(packed[8] > 0, lambda: tf.stack(ops.gray(tf.unstack(x))), lambda: x)
        if recipe.blur:
            x = blur(tf, x, packed[9])
        if recipe.solarize:
            x = tf.cond(packed[11] > 0, lambda: ops.solarize(x, tf), lambda: x)
        x = tf.cast(tf.round(x * 255), tf.uint8)
        x = tf.cond(packed[10] > 0, lambda: x[:, :, ::-1], lambda: x)
        return tf.transpose(x, (1, 2, 0))

    return compiled


def jitter(tf: Any, x: Any, factors: Any, order: Any) -> Any:
    """Changes brightness, contrast, saturation and hue by `factors`, in the given order."""
    brightness, contrast, saturation, hue = tf.unstack(factors)
    rgb = x.shape[0] == 3

    def luminance(x: Any) -> Any:
        return ops.luminance(tf.unstack(x))

    def operations(x: Any) -> list[Any]:
        return [
            lambda: ops.blend(x, 0.0, brightness, tf),
            lambda: ops.blend(x, tf.reduce_mean(luminance(x)), contrast, tf),
            lambda: ops.blend(x, luminance(x), saturation, tf) if rgb else x,
            lambda: tf.stack(ops.shift_hue(tf.unstack(x), hue, tf)) if rgb else x,
        ]

    for turn in range(4):
        x = tf.switch_case(order[turn], operations(x))
    return x


def blur(tf: Any, x: Any, sigma: Any) -> Any:
    """Applies a Gaussian blur of up to 13 taps, reflected at the border; sigma 0 changes nothing.

    Taps beyond three sigmas are omitted, which changes values by a quarter of 1/255.
    """

    def blurred(radius: int) -> Any:
        taps = tf.range(-radius, radius + 1, dtype=tf.float32)
        kernel = tf.exp(-0.5 * tf.square(taps / tf.maximum(sigma, 1e-2)))
        kernel = tf.unstack(kernel / tf.reduce_sum(kernel))
        y = tf.pad(x, [[0, 0], [radius, radius], [0, 0]], mode='REFLECT')
        y = tf.add_n([k * y[:, i : i + x.shape[1]] for i, k in enumerate(kernel)])
        y = tf.pad(y, [[0, 0], [0, 0], [radius, radius]], mode='REFLECT')
        return tf.add_n([k * y[:, :, i : i + x.shape[2]] for i, k in enumerate(kernel)])

    branches = [lambda: x, *(lambda r=r: blurred(r) for r in range(1, BLUR_RADIUS + 1))]
    reach = tf.cast(tf.math.ceil(3 * sigma), tf.int32)
    return tf.switch_case(tf.minimum(reach, BLUR_RADIUS), branches)
