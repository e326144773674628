"""What the images of a source are like, looked at in bounded time."""

import concurrent.futures
import dataclasses
import io
import os
import time

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from simsiam_jax import errors, terminal
from simsiam_jax.data.decode import decode
from simsiam_jax.data.sources import ArraySource, Source

# Thumbnails that correlate more are of one picture: of 1,797 different digits none do, of a
# photograph saved again at quality 30 or half the size both do.
ALIKE = 0.995
_THUMB = 16


@dataclasses.dataclass(frozen=True)
class ImageStats:
    """One image.

    Attributes:
      height, width, channels: as stored; alpha is not a channel, a palette is RGB.
      bits: of a value, 8 for 1 to 8; 32 for float.
      gray: one channel, or channels that are all the same.
      brightest: largest value, of 255.
      mean, square: by channel, of values in [0, 1].
      thumb: 16x16 gray values less their mean, of length 1; zeros of a blank image.
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
    """What was seen of a source.

    Attributes:
      count: images in the source.
      looks: those that were read, in an order of chance.
      names: theirs.
      bad: name -> reason of those that could not be.
      seconds: it took to read and decode an image in one thread, on average.
    """

    count: int
    looks: tuple[ImageStats, ...]
    names: tuple[str, ...]
    bad: dict[str, str]
    seconds: float

    @property
    def seen(self) -> int:
        return len(self.looks) + len(self.bad)

    @property
    def bad_fraction(self) -> float:
        return len(self.bad) / max(self.seen, 1)

    @property
    def whole(self) -> bool:
        return self.seen == self.count

    def sides(self) -> Num[np.ndarray, 'N 2']:
        """Heights and widths."""
        return np.array([(look.height, look.width) for look in self.looks])

    def channels(self) -> dict[int, int]:
        """Number of channels -> images that have them, most first."""
        return _counted([look.channels for look in self.looks])

    def bits(self) -> dict[int, int]:
        return _counted([look.bits for look in self.looks])

    def normalization(self, channels: int) -> dict[str, tuple[float, ...]]:
        """mean and std by channel of the images that have so many channels."""
        looks = [look for look in self.looks if look.channels == channels]
        mean = np.mean([look.mean for look in looks], 0)
        square = np.mean([look.square for look in looks], 0)
        std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
        return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}

    def shrinkage(self, size: int, crop_scale: tuple[float, float]) -> Float[np.ndarray, 'n']:
        """Side of the crops over side of the views, sorted: above 1 they shrink."""
        areas = np.linspace(*crop_scale, 33)
        sides = np.sqrt(np.prod(self.sides().astype(float), 1))
        return np.sort((sides[:, None] * np.sqrt(areas) / size).ravel())

    def copies(self) -> tuple[int, list[tuple[str, str]]]:
        """How many images are as another before them, and pairs of them by name."""
        if not self.looks:
            return 0, []
        thumbs = np.stack([look.thumb for look in self.looks])
        blank = ~thumbs.any(1)
        first = np.full(len(thumbs), -1)
        for start in range(0, len(thumbs), 1024):
            block = thumbs[start : start + 1024]
            alike = np.tril(block @ thumbs[: start + len(block)].T > ALIKE, start - 1)
            first[start : start + len(block)] = np.where(alike.any(1), alike.argmax(1), -1)
        first[blank] = int(blank.argmax())
        if blank.any():
            first[blank.argmax()] = -1
        found = np.flatnonzero(first >= 0)
        return len(found), [(self.names[i], self.names[first[i]]) for i in found[:5]]


def _counted(values: list[int]) -> dict[int, int]:
    numbers, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts)
    return {int(numbers[i]): int(counts[i]) for i in order}


def survey(
    source: Source | ArraySource, *, limit: int = 10_000, seconds: float = 20.0
) -> DatasetSurvey:
    """Looks at up to `limit` images, chosen by chance, for about so many seconds.

    A progress bar shows on a terminal.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[:limit]
    began, looks, names = time.monotonic(), [], []
    bad: dict[str, str] = {}
    busy = 0.0

    def look(index: int) -> tuple[str, ImageStats | str, float]:
        begin = time.perf_counter()
        if isinstance(source, ArraySource):
            return (
                f'image {index}',
                image_stats(source.images[index], 8),
                time.perf_counter() - begin,
            )
        try:
            encoded, _ = source.read(index)
            channels, bits = describe(encoded)
            image = decode(encoded, channels)
        # As the reader: whatever a damaged file or a vanished disk brings about.
        except Exception as error:
            return source.name(index), errors.reason(error), 0.0
        spent = time.perf_counter() - begin
        return source.name(index), image_stats(image, bits), spent

    threads = os.cpu_count() or 1
    chunk = 16 * threads
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        terminal.progress(None, 'looking at images', total=len(chosen), unit=' images') as bar,
    ):
        for start in range(0, len(chosen), chunk):
            for name, found, spent in pool.map(look, chosen[start : start + chunk].tolist()):
                if isinstance(found, str):
                    bad[name] = found
                else:
                    looks.append(found)
                    names.append(name)
                    busy += spent
                bar.update()
            if time.monotonic() - began > seconds:
                break
    return DatasetSurvey(len(source), tuple(looks), tuple(names), bad, busy / max(len(looks), 1))


def describe(encoded: bytes) -> tuple[int, int]:
    """(channels, bits) of an encoded image, as stored.

    Raises:
      Exception: of many types, where it is no image.
    """
    if encoded[:6] == b'\x93NUMPY':
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
        return array.shape[-1] if array.ndim == 3 else 1, 8 * array.dtype.itemsize
    if encoded[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        import tifffile

        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            page, shape = file.pages.first, file.series[0].shape
            # Of three sides the last is channels, unless they are gray pages one after the other.
            channels = shape[-1] if len(shape) == 3 and shape[-1] < min(shape[:2]) else 1
            # Two are gray and alpha, and decode knows four of PIL's modes only.
            return {2: 1}.get(channels, channels), max(page.bitspersample, 8)
    with Image.open(io.BytesIO(encoded)) as image:
        gray = image.mode in ('1', 'L', 'LA', 'La', 'F') or image.mode.startswith('I')
        deep = {'I': 16, 'F': 32}.get(image.mode, 16 if image.mode.startswith('I;16') else 8)
    if encoded[:8] == b'\x89PNG\r\n\x1a\n':
        deep = max(encoded[24], 8)  # PIL opens RGB of 16 bits as of 8
    return (1 if gray else 3), deep


def image_stats(image: UInt8[np.ndarray, 'H W C'], bits: int) -> ImageStats:
    """The look of a decoded image; statistics are of pixels spread evenly over it."""
    height, width, channels = image.shape
    step = max(1, min(height, width) // 64)
    some = image[::step, ::step]
    pixels = some.reshape(-1, channels).astype(np.float32) / 255
    small = Image.fromarray(some.astype(np.float32).mean(-1))
    thumb = np.asarray(small.resize((_THUMB, _THUMB), Image.Resampling.BOX)).ravel()
    thumb = thumb - thumb.mean()
    length = float(np.linalg.norm(thumb))
    return ImageStats(
        height,
        width,
        channels,
        bits,
        # JPEG's colors of a gray image are off by a rounding.
        gray=bool(_spread(some) <= 2),
        brightest=int(some.max()),
        mean=pixels.mean(0),
        square=np.square(pixels).mean(0),
        thumb=thumb / length if length > 0.1 else np.zeros_like(thumb),
    )


def _spread(image: UInt8[np.ndarray, 'H W C']) -> int:
    """Largest difference between the channels of a pixel."""
    return int((image.max(-1) - image.min(-1)).max())
