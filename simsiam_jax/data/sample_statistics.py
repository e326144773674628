"""Statistics of a sample of an image set: range of values, mean and standard deviation."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Num, UInt8

from simsiam_jax import terminal
from simsiam_jax.data import decode, sampler
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.data.value_range import DTYPE, PERCENTILES, ValueRange, percentiles

T = TypeVar('T')

_SAMPLE = 1000  # images
_PIXELS = 4096  # of an image whose percentiles are measured


def measure_range(reader: Reader) -> ValueRange:
    """Returns the range of the deep images: percentiles of each channel in evenly spaced images.

    Prints the range. Without deep images it is that of the type.
    """

    def pixels(index: int) -> Num[np.ndarray, 'n C'] | None:
        raster = reader.read_deep(index)
        stored = raster.values.shape[-1] if raster else 0
        if raster is None or (stored != reader.channels and {stored, reader.channels} != {1, 3}):
            return None
        visible = raster.values.reshape(-1, stored)
        if raster.alpha is not None:
            visible = visible[raster.alpha.ravel() > 0]
        return decode.match(visible[:: max(1, len(visible) // _PIXELS)], reader.channels)

    sampled = _sampled(len(reader), pixels, 'measuring values')
    if not (found := [x for x in sampled if x is not None and len(x)]):
        return DTYPE
    values = np.concatenate(found)
    measured = percentiles(values)
    low, high = PERCENTILES
    missing = float((~np.isfinite(values)).mean())
    note = f'; {missing:.2%} are not finite, and NaN becomes 0' if missing else ''
    terminal.say(
        f'values from {low}% to {high}% of {len(found):,} sampled images of other types than 8 '
        f'bits, by channel: {measured}. They become 0 to 255 (config.data.range=auto){note}'
    )
    return measured


def measure_normalization(source: ArraySource | Reader) -> dict[str, tuple[float, ...]]:
    """Returns mean and std by channel, of values in [0, 1], from evenly spaced images."""

    def sums(index: int) -> Float[np.ndarray, '3 C']:
        if isinstance(source, ArraySource):
            return _sums(source.images[index])
        return _sums(source.example(index)[0])

    sampled = _sampled(len(source), sums, 'measuring mean and std')
    count, total, squares = functools.reduce(np.add, sampled)
    mean = total / count
    # The floor avoids a division by zero if all images are constant.
    std = np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1 / 255)
    return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}


def _sums(image: UInt8[np.ndarray, 'H W C']) -> Float[np.ndarray, '3 C']:
    """Returns number, sum, and sum of squares of the values in [0, 1] of each channel."""
    channels = image.shape[-1]
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(channels)])
    return np.stack([counts.sum(1), counts @ levels, counts @ levels**2])


def _sampled(count: int, function: Callable[[int], T], title: str) -> Iterator[T]:
    """Yields the function of evenly spaced indices, computed in threads."""
    indices = sampler.evenly_spaced(count, _SAMPLE).tolist()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from terminal.progress(
            pool.map(function, indices), title, total=len(indices), unit=' images'
        )
