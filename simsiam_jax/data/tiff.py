"""Reads TIFF files: bands in any layout, types of any depth, pyramids and compressions."""

import dataclasses
import io
import math
from typing import Any

import numpy as np

from simsiam_jax.data.raster import Raster, check_pixels, of_array, orientation_of, split_alpha

# The first bytes of TIFF files and of BigTIFF files, little-endian and big-endian.
MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# Pages of unknown meaning are the bands of one image up to this number.
_MAX_PAGES = 16


def read(encoded: bytes) -> Raster | None:
    """Reads the largest image of a TIFF file; None if PIL has to, such as for a palette."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        series = max(file.series, key=_area).levels[0]
        page, axes = series.keyframe, series.axes
        if series.kind == 'shaped' and axes == 'QYX' and series.shape[2] < min(series.shape[:2]):
            axes = 'YXS'  # an array [H, W, C], which tifffile writes as H pages if not told better
        sizes = dict(zip(axes, series.shape, strict=True))
        kind, photometric = tifffile.PHOTOMETRIC, page.photometric
        jpeg = page.compression == tifffile.COMPRESSION.JPEG
        gray = photometric in (kind.MINISBLACK, kind.MINISWHITE)
        if not gray and photometric != kind.RGB and not (photometric == kind.YCBCR and jpeg):
            return None
        if not {'Y', 'X'} <= set(sizes):
            raise ValueError(f'axes {axes}; expected Y and X among them')
        check_pixels(sizes['Y'], sizes['X'], math.prod(series.shape) // (sizes['Y'] * sizes['X']))
        bands = _band_axis(sizes)
        whole = {'Y', 'X', bands}
        array = series.asarray()[tuple(slice(None) if a in whole else 0 for a in axes)]
        if not bands:
            array = array[..., None]
        else:
            array = np.moveaxis(array, [a for a in axes if a in whole].index(bands), -1)
        bits = page.bitspersample
        if photometric == kind.MINISWHITE and array.dtype.kind in 'bu':
            array = ~array if array.dtype == bool else (2**bits - 1) - array
        raster = of_array(np.ascontiguousarray(array), bits)
        raster = dataclasses.replace(raster, orientation=orientation_of(lambda: _tags(page)))
        alpha = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
        if bands != 'S' or not page.extrasamples or page.extrasamples[-1] not in alpha:
            return raster
        return split_alpha(raster, page.extrasamples[-1] == alpha[0])


def _area(series: Any) -> int:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return sizes.get('Y', 0) * sizes.get('X', 0)


def _band_axis(sizes: dict[str, int]) -> str:
    """Returns the axis of a TIFF file's channels, '' for one channel.

    Samples, else channels (C), else pages of unknown meaning (Q, I) if they are few. Depth (Z),
    time (T) and all other axes are stacks of images, of which the first is read.
    """
    for axis in 'SCQI':
        if sizes.get(axis, 1) > 1 and (axis in 'SC' or sizes[axis] <= _MAX_PAGES):
            return axis
    return ''


def _tags(page: Any) -> dict[int, Any]:
    return {tag.code: tag.value for tag in page.tags}
