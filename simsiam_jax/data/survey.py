"""Statistics of a source's images, measured in bounded time."""

import concurrent.futures
import dataclasses
import os
import time

import numpy as np
from jaxtyping import Float, Int, Num, UInt8
from PIL import Image

from simsiam_jax import errors, terminal
from simsiam_jax.data import decode, raster_files
from simsiam_jax.data.raster import Raster
from simsiam_jax.data.sources import ArraySource, Source
from simsiam_jax.data.value_range import DTYPE, ValueRange, percentiles, stretch

# Correlation of the thumbnails of near-duplicates. No two of 1,797 different digits reach it; a
# photograph saved again at quality 30 or at half the size does.
NEAR_DUPLICATE = 0.995
_THUMB = 16


@dataclasses.dataclass(frozen=True)
class ImageStats:
    """Statistics of an image.

    Attributes:
      height, width, channels: Shape, upright; alpha is not a channel, a palette is RGB.
      bits: Bits of a value, 8 for 1 to 8.
      deep: Whether the values are of another type than 8 bits without sign.
      gray: True for one channel or identical channels.
      transparent: Whether some pixels are transparent.
      orientation: EXIF orientation, 1 to 8.
      pixels: Values of some pixels as stored, spread evenly over the image.
      thumb: Result of `thumbnail`.
    """

    height: int
    width: int
    channels: int
    bits: int
    deep: bool
    gray: bool
    transparent: bool
    orientation: int
    pixels: Num[np.ndarray, 'n C']
    thumb: np.ndarray


@dataclasses.dataclass(frozen=True)
class DatasetSurvey:
    """Statistics of a source.

    Attributes:
      count: Number of images in the source.
      images: Statistics of the images that were read, in random order.
      names: Names of these images.
      bad: Name -> reason of the images that could not be read.
      seconds: Mean time to read and decode an image in one thread.
    """

    count: int
    images: tuple[ImageStats, ...]
    names: tuple[str, ...]
    bad: dict[str, str]
    seconds: float

    @property
    def seen(self) -> int:
        return len(self.images) + len(self.bad)

    @property
    def bad_fraction(self) -> float:
        return len(self.bad) / max(self.seen, 1)

    @property
    def whole(self) -> bool:
        return self.seen == self.count

    def sides(self) -> Num[np.ndarray, 'N 2']:
        """Returns heights and widths."""
        return np.array([(image.height, image.width) for image in self.images])

    def channels(self) -> dict[int, int]:
        """Returns number of channels -> number of images, the most frequent first."""
        return _counted([image.channels for image in self.images])

    def bits(self) -> dict[int, int]:
        """Returns bits of a value -> number of images, the most frequent first."""
        return _counted([image.bits for image in self.images])

    def deep(self, channels: int) -> list[ImageStats]:
        """Returns the deep images with `channels` channels."""
        return [i for i in self.images if i.deep and i.channels == channels]

    def value_range(self, channels: int) -> ValueRange:
        """Returns the range that config.data.range=auto would measure."""
        values = [image.pixels.astype(np.float64) for image in self.deep(channels)]
        return percentiles(np.concatenate(values)) if values else DTYPE

    def normalization(
        self, channels: int, chosen: ValueRange | None = None
    ) -> dict[str, tuple[float, ...]]:
        """Returns mean and std by channel of the images with `channels` channels.

        Args:
          channels: Number of channels.
          chosen: Range of deep images; None measures it.
        """
        chosen = chosen or self.value_range(channels)
        images = [image for image in self.images if image.channels == channels]
        levels = [_levels(image, chosen) / np.float32(255) for image in images]
        mean = np.mean([x.mean(0) for x in levels], 0)
        square = np.mean([np.square(x).mean(0) for x in levels], 0)
        std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
        return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}

    def histogram(self, channels: int, chosen: ValueRange) -> Int[np.ndarray, 'C 256']:
        """Returns the number of sampled pixels of deep images by channel and level, 0 to 255."""
        levels = np.concatenate([_levels(image, chosen) for image in self.deep(channels)])
        return np.stack([np.bincount(x, minlength=256) for x in levels.T])

    def shrinkage(self, size: int, crop_scale: tuple[float, float]) -> Float[np.ndarray, 'n']:
        """Returns side of the crops over side of the views, sorted; above 1 crops shrink."""
        areas = np.linspace(*crop_scale, 33)
        sides = np.sqrt(np.prod(self.sides().astype(float), 1))
        return np.sort((sides[:, None] * np.sqrt(areas) / size).ravel())

    def near_duplicates(self) -> tuple[int, list[tuple[str, str]]]:
        """Returns the number of images that repeat an earlier one, and names of five pairs."""
        if not self.images:
            return 0, []
        original = near_duplicates(np.stack([image.thumb for image in self.images]))
        repeated = np.flatnonzero(original >= 0)
        return len(repeated), [(self.names[i], self.names[original[i]]) for i in repeated[:5]]


def _levels(image: ImageStats, chosen: ValueRange) -> UInt8[np.ndarray, 'n C']:
    """Returns the sampled pixels as decoded."""
    if not image.deep:
        return image.pixels
    low, high = chosen.bounds(image.pixels.dtype, image.bits)
    return stretch(decode.match(image.pixels, image.channels), low, high)


def _counted(values: list[int]) -> dict[int, int]:
    numbers, counts = np.unique(values, return_counts=True)
    by_count = np.argsort(-counts)
    return {int(numbers[i]): int(counts[i]) for i in by_count}


def survey(
    source: Source | ArraySource, *, limit: int = 10_000, seconds: float = 20.0
) -> DatasetSurvey:
    """Measures up to `limit` randomly chosen images for about `seconds` seconds.

    Shows a progress bar on a terminal.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[:limit]
    began, busy = time.monotonic(), 0.0
    images, names, bad = [], [], {}

    def measure(index: int) -> tuple[str, ImageStats | str, float]:
        """Returns name, statistics or the reason why there are none, and seconds of decoding."""
        begin = time.perf_counter()
        if isinstance(source, ArraySource):
            stats = image_stats(Raster(source.images[index]))
            return f'image {index}', stats, time.perf_counter() - begin
        try:
            raster = raster_files.read(source.read(index)[0])
        # As in the reader: damaged files and lost disks raise errors of many types.
        except Exception as error:
            return source.name(index), errors.reason(error), 0.0
        spent = time.perf_counter() - begin
        return source.name(index), image_stats(raster), spent

    threads = os.cpu_count() or 1
    chunk = 16 * threads
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        terminal.progress(None, 'surveying images', total=len(chosen), unit=' images') as bar,
    ):
        for start in range(0, len(chosen), chunk):
            for name, stats, spent in pool.map(measure, chosen[start : start + chunk].tolist()):
                if isinstance(stats, str):
                    bad[name] = stats
                else:
                    images.append(stats)
                    names.append(name)
                    busy += spent
                bar.update()
            if time.monotonic() - began > seconds:
                break
    return DatasetSurvey(len(source), tuple(images), tuple(names), bad, busy / max(len(images), 1))


def image_stats(raster: Raster) -> ImageStats:
    """Returns the statistics of an image."""
    upright = raster.upright()
    height, width, channels = upright.values.shape
    shown = _shown(upright.values)
    pixels = _sampled(upright.values, 24).reshape(-1, channels)
    visible = None if upright.alpha is None else _sampled(upright.alpha, 24).ravel() > 0
    return ImageStats(
        height,
        width,
        channels,
        raster.bits,
        deep=raster.deep,
        # Rounding makes the channels of a gray JPEG differ slightly.
        gray=bool(_spread(shown) <= 2),
        transparent=visible is not None,
        orientation=raster.orientation,
        pixels=pixels if visible is None or not visible.any() else pixels[visible],
        thumb=thumbnail(shown),
    )


def _shown(values: Num[np.ndarray, 'H W C']) -> UInt8[np.ndarray, 'h w C']:
    """Returns sampled values; those of a deep image as 0 to 255 from its lowest to its highest."""
    sampled = _sampled(values)
    if sampled.dtype == np.uint8:
        return sampled
    finite = sampled[np.isfinite(sampled)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    sampled = sampled.astype(np.float64)
    return stretch(sampled, np.array([low]), np.array([high if high > low else low + 1]))


def thumbnail(image: UInt8[np.ndarray, 'H W C']) -> Float[np.ndarray, '256']:
    """Returns 16x16 gray values minus their mean, scaled to length 1; zeros for a blank image."""
    small = Image.fromarray(_sampled(image).astype(np.float32).mean(-1))
    thumb = np.asarray(small.resize((_THUMB, _THUMB), Image.Resampling.BOX)).ravel()
    thumb = thumb - thumb.mean()
    length = float(np.linalg.norm(thumb))
    return thumb / length if length > 0.1 else np.zeros_like(thumb)


def near_duplicates(thumbs: Float[np.ndarray, 'N 256']) -> Int[np.ndarray, 'N']:
    """Returns the index of the first earlier near-duplicate of each image, -1 if there is none.

    Two images are near-duplicates if their thumbnails correlate above 0.995, or if both are blank.
    So a copy saved at another quality, size, brightness or contrast counts; other images of the
    same kind do not.

    Args:
      thumbs: Results of `thumbnail`.
    """
    first = np.full(len(thumbs), -1)
    for start in range(0, len(thumbs), 1024):
        block = thumbs[start : start + 1024]
        near = np.tril(block @ thumbs[: start + len(block)].T > NEAR_DUPLICATE, start - 1)
        first[start : start + len(block)] = np.where(near.any(1), near.argmax(1), -1)
    blank = np.flatnonzero(~thumbs.any(1))
    first[blank[1:]] = blank[:1]
    return first


def _sampled(image: Num[np.ndarray, 'H W ...'], side: int = 64) -> Num[np.ndarray, 'h w ...']:
    """Returns pixels on a grid of at least `side` x `side`, copied: the image may be large."""
    steps = (max(1, length // side) for length in image.shape[:2])
    return image[tuple(slice(None, None, step) for step in steps)].copy()


def _spread(image: UInt8[np.ndarray, 'H W C']) -> int:
    """Returns the largest difference between the channels of a pixel."""
    return int((image.max(-1) - image.min(-1)).max())
