"""Colour operations with torchvision's float semantics, for arrays of JAX and TensorFlow alike.

Images are float32 [..., H, W, C] with values in [0, 1]; `xp` is jax.numpy or tensorflow. What
tf.image calls by these names differs: it adds brightness, takes contrast by channel, and
saturates in HSV.
"""

from types import ModuleType
from typing import Any


def gray(rgb: Any) -> Any:
    """Luminance [..., H, W, 1]; an image that is not RGB is its own."""
    if rgb.shape[-1] != 3:
        return rgb
    return 0.2989 * rgb[..., :1] + 0.587 * rgb[..., 1:2] + 0.114 * rgb[..., 2:]


def blend(x: Any, reference: Any, factor: Any, xp: ModuleType) -> Any:
    """factor x + (1 - factor) reference, in [0, 1].

    Brightness against 0, contrast against the mean of the gray image, saturation against it.
    """
    return xp.minimum(xp.maximum(factor * x + (1 - factor) * reference, 0.0), 1.0)


def shift_hue(rgb: Any, turns: Any, xp: ModuleType) -> Any:
    """The hue turned by `turns` of the circle, value and chroma kept."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
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

    return xp.stack([channel(5.0), channel(3.0), channel(1.0)], -1)
