"""Color operations with torchvision's float semantics, for arrays of both JAX and TensorFlow.

Images are float32 in [0, 1], as one plane per channel: compilers fuse operations on separate planes
into one pass, but need many passes if channels are the last axis. `xp` is jax.numpy or tensorflow.
The operations of tf.image with these names differ: tf.image adds brightness, changes contrast by
channel, and saturates in HSV.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any


def luminance(planes: Sequence[Any]) -> Any:
    """Returns the plane of the gray image; the mean of channels that are not RGB."""
    if len(planes) != 3:
        return sum(planes) / len(planes)
    r, g, b = planes
    return 0.2989 * r + 0.587 * g + 0.114 * b


def gray(planes: Sequence[Any]) -> list[Any]:
    """Returns the gray image; images that are not RGB are returned unchanged."""
    return [luminance(planes)] * 3 if len(planes) == 3 else list(planes)


def blend(x: Any, reference: Any, factor: Any, xp: ModuleType) -> Any:
    """Returns factor x + (1 - factor) reference, in [0, 1].

    The reference is 0 for brightness, the mean luminance for contrast, the luminance for
    saturation.
    """
    return xp.minimum(xp.maximum(factor * x + (1 - factor) * reference, 0.0), 1.0)


def shift_hue(planes: Sequence[Any], turns: Any, xp: ModuleType) -> list[Any]:
    """Shifts the hue of RGB by `turns` of the circle; value and chroma stay."""
    r, g, b = planes
    value = xp.maximum(xp.maximum(r, g), b)
    chroma = value - xp.minimum(xp.minimum(r, g), b)
    safe = xp.where(chroma > 0, chroma, 1.0)
    # Not `value == r`: a compiler that computes r twice may round it differently.
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
    """Returns 1 - x for x above 1/2: torchvision's solarize with threshold 0.5, or 128 of uint8."""
    return xp.minimum(x, 1 - x)
