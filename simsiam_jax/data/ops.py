"""Colour operations with torchvision's float semantics, for arrays of JAX and TensorFlow alike.

Images are float32 with values in [0, 1] and their channels along `axis`; `xp` is jax.numpy or
tensorflow. What tf.image calls by these names differs: it adds brightness, takes contrast by
channel, and saturates in HSV.
"""

from types import ModuleType
from typing import Any


def gray(x: Any, xp: ModuleType, axis: int = -1) -> Any:
    """Luminance, one channel; an image that is not RGB is its own."""
    if x.shape[axis] != 3:
        return x
    r, g, b = xp.unstack(x, axis=axis)
    return xp.expand_dims(0.2989 * r + 0.587 * g + 0.114 * b, axis)


def blend(x: Any, reference: Any, factor: Any, xp: ModuleType) -> Any:
    """factor x + (1 - factor) reference, in [0, 1].

    Brightness against 0, contrast against the mean of the gray image, saturation against it.
    """
    return xp.minimum(xp.maximum(factor * x + (1 - factor) * reference, 0.0), 1.0)


def shift_hue(rgb: Any, turns: Any, xp: ModuleType, axis: int = -1) -> Any:
    """The hue turned by `turns` of the circle, value and chroma kept."""
    r, g, b = xp.unstack(rgb, axis=axis)
    value = xp.maximum(xp.maximum(r, g), b)
    chroma = value - xp.minimum(xp.minimum(r, g), b)
    safe = xp.where(chroma > 0, chroma, 1.0)
    # Not `value == r`: a compiler may round r otherwise where it computes it a second time.
    sector = xp.where(
        (r >= g) & (r >= b),
        (g - b) / safe,
        xp.where(g >= b, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )
    sector = sector + 6 * turns

    def channel(n: float) -> Any:
        k = (n + sector) % 6.0
        return value - chroma * xp.maximum(xp.minimum(xp.minimum(k, 4 - k), 1.0), 0.0)

    return xp.stack([channel(5.0), channel(3.0), channel(1.0)], axis)


def solarise(x: Any, xp: ModuleType) -> Any:
    """1 - x above 1/2: torchvision's solarize with threshold 0.5, or 128 of uint8."""
    return xp.minimum(x, 1 - x)
