"""Statistics of a source's images, measured in bounded time."""

import concurrent.futures
import dataclasses
import io
import os
import time

import numpy as np
from jaxtyping import Float, Int, Num, UInt8
from PIL import Image

from simsiam_jax import errors, terminal
from simsiam_jax.data.decode import decode
from simsiam_jax.data.sources import ArraySource, Source

# Correlation of the thumbnails of near-duplicates. No two of 1,797 different digits reach it; a
# photograph saved again at quality 30 or at half the size does.
NEAR_DUPLICATE = 0.995
_THUMB = 16


@dataclasses.dataclass(frozen=True)
class ImageStats:
    """Statistics of an image.

    Attributes:
      height, width, channels: Shape as stored; alpha is not a channel, a palette is RGB.
      bits: Bits of a value, 8 for 1 to 8; 32 for float.
      gray: True for one channel or identical channels.
      brightest: Largest value, of 255.
      mean, square: Mean and mean square of values in [0, 1], by channel.
      thumb: Result of `thumbnail`.
    """

    height: int
    width: int
    channels: int
    bits: int
    gray: bool
    brightest: int
    mean: np.ndarray
    square: np.ndarray
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

    def normalization(self, channels: int) -> dict[str, tuple[float, ...]]:
        """Returns mean and std by channel of the images with `channels` channels."""
        images = [image for image in self.images if image.channels == channels]
        mean = np.mean([image.mean for image in images], 0)
        square = np.mean([image.square for image in images], 0)
        std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
        return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}

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
            stats = image_stats(source.images[index], 8)
            return f'image {index}', stats, time.perf_counter() - begin
        try:
            encoded, _ = source.read(index)
            channels, bits = describe(encoded)
            image = decode(encoded, channels)
        # As in the reader: damaged files and lost disks raise errors of many types.
        except Exception as error:
            return source.name(index), errors.reason(error), 0.0
        spent = time.perf_counter() - begin
        return source.name(index), image_stats(image, bits), spent

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


def describe(encoded: bytes) -> tuple[int, int]:
    """Returns (channels, bits) of an encoded image, as stored.

    Raises:
      Exception: The bytes are not an image; errors of many types.
    """
    if encoded[:6] == b'\x93NUMPY':
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
        return array.shape[-1] if array.ndim == 3 else 1, 8 * array.dtype.itemsize
    if encoded[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        import tifffile

        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            page, shape = file.pages.first, file.series[0].shape
            # The last of three sides is channels, unless the file is a stack of gray pages.
            channels = shape[-1] if len(shape) == 3 and shape[-1] < min(shape[:2]) else 1
            # Two channels are gray and alpha, and decode knows only four of PIL's modes.
            return {2: 1}.get(channels, channels), max(page.bitspersample, 8)
    with Image.open(io.BytesIO(encoded)) as image:
        gray = image.mode in ('1', 'L', 'LA', 'La', 'F') or image.mode.startswith('I')
        bits = {'I': 16, 'F': 32}.get(image.mode, 16 if image.mode.startswith('I;16') else 8)
    if encoded[:8] == b'\x89PNG\r\n\x1a\n':
        bits = max(encoded[24], 8)  # PIL opens 16-bit RGB as 8-bit
    return (1 if gray else 3), bits


def image_stats(image: UInt8[np.ndarray, 'H W C'], bits: int) -> ImageStats:
    """Returns the statistics of a decoded image, from pixels spread evenly over it."""
    height, width, channels = image.shape
    sampled = _sampled(image)
    pixels = sampled.reshape(-1, channels).astype(np.float32) / 255
    return ImageStats(
        height,
        width,
        channels,
        bits,
        # Rounding makes the channels of a gray JPEG differ slightly.
        gray=bool(_spread(sampled) <= 2),
        brightest=int(sampled.max()),
        mean=pixels.mean(0),
        square=np.square(pixels).mean(0),
        thumb=thumbnail(image),
    )


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


def _sampled(image: UInt8[np.ndarray, 'H W C']) -> UInt8[np.ndarray, 'h w C']:
    step = max(1, min(image.shape[:2]) // 64)
    return image[::step, ::step]


def _spread(image: UInt8[np.ndarray, 'H W C']) -> int:
    """Returns the largest difference between the channels of a pixel."""
    return int((image.max(-1) - image.min(-1)).max())
