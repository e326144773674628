"""An image as an array of the values that its file stores: one description for all formats."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped, UInt8

MAX_PIXELS = 2**27
_MAX_VALUES = 4 * MAX_PIXELS
# Directions of rows and columns by EXIF orientation; from 5 on they are exchanged first.
_DIRECTIONS = {
    **{2: (1, -1), 3: (-1, -1), 4: (-1, 1)},
    **{5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)},
}


@dataclasses.dataclass(frozen=True)
class Raster:
    """An image as stored, upright only after `upright`.

    Attributes:
      values: Gray, RGB or bands; alpha is not among them, and a palette is RGB.
      bits: Bits of a value, 8 for 1 to 8.
      alpha: Opacity, 255 for opaque; None without transparency.
      orientation: EXIF orientation, 1 to 8.
    """

    values: Num[np.ndarray, 'H W C']
    bits: int = 8
    alpha: UInt8[np.ndarray, 'H W'] | None = None
    orientation: int = 1

    @property
    def deep(self) -> bool:
        """Returns whether the values are of another type than 8 bits without sign."""
        return self.values.dtype != np.uint8

    def upright(self) -> 'Raster':
        """Returns the image as it is to be seen, by its EXIF orientation."""
        values, alpha = (_turned(x, self.orientation) for x in (self.values, self.alpha))
        return dataclasses.replace(self, values=values, alpha=alpha, orientation=1)


def of_array(array: Shaped[np.ndarray, '...'], bits: int = 0) -> Raster:
    """Returns the raster of an array [H, W, C]; `bits` of 0 are those of its type."""
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f'shape {array.shape}; expected [H, W] or [H, W, C]')
    if array.dtype == bool:
        return Raster(array.astype(np.uint8) * np.uint8(255))
    if array.dtype.kind not in 'iuf':
        raise ValueError(f'dtype {array.dtype}; expected integers or floats')
    array = array.astype(array.dtype.newbyteorder('='), copy=False)
    return Raster(array, max(bits or 8 * array.dtype.itemsize, 8))


def split_alpha(raster: Raster, premultiplied: bool) -> Raster:
    """Returns the raster with its last channel as alpha.

    Args:
      raster: Image with alpha among its channels.
      premultiplied: Whether the colors are multiplied by alpha.
    """
    values, alpha = raster.values[..., :-1], raster.values[..., -1].astype(np.float32)
    top = np.float32(1 if raster.values.dtype.kind == 'f' else 2**raster.bits - 1)
    opacity = np.clip(alpha / top, 0, 1)
    if premultiplied:
        values = values / np.where(opacity > 0, opacity, 1)[..., None]
        values = values if raster.values.dtype.kind == 'f' else np.minimum(np.round(values), top)
    values = np.ascontiguousarray(values.astype(raster.values.dtype))
    alpha = np.round(opacity * 255).astype(np.uint8)
    return dataclasses.replace(raster, values=values, alpha=alpha)


def check_pixels(height: int, width: int, bands: int = 1) -> None:
    """Raises ValueError if the image is empty or too large: damaged headers claim gigapixels."""
    if not height * width * bands:
        raise ValueError(f'shape ({height}, {width}, {bands}); expected at least one pixel')
    if height * width > MAX_PIXELS or height * width * bands > _MAX_VALUES:
        of = f' of {bands} channels' if bands > 1 else ''
        raise ValueError(
            f'{height}x{width} pixels{of}; expected at most {MAX_PIXELS}, and {_MAX_VALUES} values'
        )


def orientation_of(tags: Callable[[], Mapping[int, Any]]) -> int:
    """Returns the EXIF orientation among the tags that a function reads."""
    try:
        value = tags().get(0x0112, 1)
    except Exception:  # damaged metadata must not cost an image; errors of any type
        return 1
    return value if value in range(1, 9) else 1


def _turned(array: Any, orientation: int) -> Any:
    """Returns the array [H, W, ...] as EXIF's orientation shows it."""
    if array is None or orientation == 1:
        return array
    rows, columns = _DIRECTIONS[orientation]
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array[::rows, ::columns])
