"""Decodes images to uint8 arrays without holding Python's global lock."""

import dataclasses

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from simsiam_jax.data import raster_files
from simsiam_jax.data.raster import Raster
from simsiam_jax.data.value_range import DTYPE, ValueRange, stretch


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How stored images become uint8 arrays.

    Attributes:
      range: Values that become 0 and 255, for images of other types than 8 bits.
      orientation: Whether the EXIF orientation is applied.
      background: Color behind transparent pixels, 0 to 255, of all channels or by channel; ()
        ignores transparency.
    """

    range: ValueRange = DTYPE
    orientation: bool = True
    background: tuple[int, ...] = (0,)


DEFAULT = Decoding()


def decode(
    encoded: bytes, channels: int, decoding: Decoding = DEFAULT
) -> UInt8[np.ndarray, 'H W C']:
    """Decodes an image file of any of the formats in docs/guides/data.md.

    Gray images are converted to RGB and RGB to gray to match `channels`. Of 4 channels, the fourth
    of a gray or RGB image is its alpha.

    Raises:
      ValueError: The file is damaged, not an image, has other channels or is too large.
    """
    return to_uint8(raster_files.read(encoded, luminance=channels == 1), channels, decoding)


def to_uint8(raster: Raster, channels: int, decoding: Decoding) -> UInt8[np.ndarray, 'H W C']:
    """Returns the image of a raster.

    Raises:
      ValueError: The raster has other channels.
    """
    if decoding.orientation and raster.orientation > 1:
        raster = raster.upright()
    values, alpha = raster.values, raster.alpha
    stored = values.shape[-1]
    if not fits(stored, channels):
        raise ValueError(f'shape {values.shape}; expected [H, W, {channels}]')
    with_alpha = channels == 4 != stored
    colors = 3 if with_alpha else channels
    if raster.deep:
        low, high = decoding.range.bounds(values.dtype, raster.bits)
        values = stretch(match(values, colors), low[:colors], high[:colors])
    elif stored == 3 and colors == 1:
        values = np.asarray(Image.fromarray(values).convert('L'))[..., None]
    elif stored != colors:
        values = np.repeat(values, colors, -1)
    if with_alpha:
        opaque = np.full(values.shape[:2], 255, np.uint8)
        values = np.dstack([values, opaque if alpha is None else alpha])
    elif alpha is not None and decoding.background:
        opacity = alpha[..., None].astype(np.float32) / 255
        behind = np.asarray(decoding.background, np.float32)
        values = np.round(values * opacity + behind * (1 - opacity)).astype(np.uint8)
    return np.ascontiguousarray(values)


def fits(stored: int, channels: int) -> bool:
    """Returns whether images of `stored` channels can be decoded to `channels`."""
    return stored == channels or (stored in (1, 3) and channels in (1, 3, 4))


def match(values: Num[np.ndarray, '... C'], channels: int) -> Float[np.ndarray, '... D']:
    """Returns floats, gray as RGB or RGB as gray if the numbers of channels differ."""
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    if values.shape[-1] == channels:
        return values
    if channels == 1:  # PIL's weights of RGB
        return values @ np.array([[0.299], [0.587], [0.114]], values.dtype)
    return np.repeat(values, channels, -1)
