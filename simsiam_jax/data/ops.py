"""Color operations with torchvision's float semantics, for arrays of JAX and TensorFlow alike.

Images are float32 with values in [0, 1], as their channels' planes: compilers make one pass of
operations on planes that lie apart, many where channels are the last axis. `xp` is jax.numpy or
tensorflow. What tf.image calls by these names differs: it adds brightness, takes contrast by
channel, and saturates in HSV.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any


def luminance(planes: Sequence[Any]) -> Any:
    """The gray image's plane; of channels that are not RGB their mean."""
    if len(planes) != 3:
        return sum(planes) / len(planes)
    r, g, b = planes
    return 0.2989 * r + 0.587 * g + 0.114 * b


def gray(planes: Sequence[Any]) -> list[Any]:
    """The gray image; one that is not RGB is its own."""
    return [luminance(planes)] * 3 if len(planes) == 3 else list(planes)


def blend(x: Any, reference: Any, factor: Any, xp: ModuleType) -> Any:
    """factor x + (1 - factor) reference, in [0, 1].

    Brightness against 0, contrast against the mean luminance, saturation against the luminance.
    """
    return xp.minimum(xp.maximum(factor * x + (1 - factor) * reference, 0.0), 1.0)


def shift_hue(planes: Sequence[Any], turns: Any, xp: ModuleType) -> list[Any]:
    """The hue of RGB turned by `turns` of the circle, value and chroma kept."""
    r, g, b = planes
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

    return [channel(5.0), channel(3.0), channel(1.0)]


def solarize(x: Any, xp: ModuleType) -> Any:
    """1 - x above 1/2: torchvision's solarize with threshold 0.5, or 128 of uint8."""
    return xp.minimum(x, 1 - x)
