"""Thumbnails of many images in few sheets, within a limit of bytes."""

import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from simsiam_jax import terminal
from simsiam_jax.data import sampler

COLUMNS = 16  # tiles on a side of a sheet
_TILES = COLUMNS**2
# Side of a thumbnail in pixels and quality of its WebP, in the order in which they are tried.
_SIZES = ((96, 80), (64, 75), (48, 70), (32, 70), (32, 45))
_SAMPLE = 192  # images that estimate the bytes of all; not a whole sheet
_SHARED = 1.03  # factor for estimates, which may be too low

Read = Callable[[int], UInt8[np.ndarray, 'H W C']]


@dataclasses.dataclass(frozen=True)
class Thumbnails:
    """Sheets of 16 x 16 square tiles, each with a thumbnail at its top left.

    Attributes:
      side: Side of a tile, pixels.
      sheets: WebP files.
      places: Number [N] of each image's tile, counted over all sheets; -1 for images without one.
      sizes: Width and height [N, 2] of each thumbnail, pixels.
    """

    side: int
    sheets: list[bytes]
    places: Int[np.ndarray, 'N']
    sizes: UInt8[np.ndarray, 'N 2']

    @property
    def count(self) -> int:
        """Number of images with a thumbnail."""
        return int((self.places >= 0).sum())


def make(read: Read, count: int, *, limit: int) -> Thumbnails:
    """Returns thumbnails of images in sheets of at most `limit` bytes.

    The thumbnails are as large and as good as the limit allows. If the smallest of all images
    exceed it, only evenly spaced images have one.

    Args:
      read: Function (index) -> image; called from several threads.
      count: Number of images.
      limit: Bytes of all sheets.
    """
    sample = list(_small(read, sampler.evenly_spaced(count, _SAMPLE), _SIZES[0][0]))
    for side, lossy in _SIZES:
        costs = {quality: len(_encode(sample, side, quality)) for quality in (lossy, None)}
        quality = min(costs, key=lambda quality: costs[quality])
        each = _SHARED * costs[quality] / len(sample)
        if each * count <= limit:
            break
    side = min(side, max(max(image.shape[:2]) for image in sample))  # never enlarged
    places = np.full(count, -1)
    sizes = np.zeros((count, 2), np.uint8)
    sheets: list[bytes] = []
    left = limit
    shown = sampler.evenly_spaced(count, int(limit / each))
    tiles: list[np.ndarray] = []
    images = terminal.progress(
        _small(read, shown, side), 'making thumbnails', total=len(shown), unit=' images'
    )
    for number, (index, image) in enumerate(zip(shown.tolist(), images, strict=True)):
        sizes[index] = image.shape[1], image.shape[0]
        tiles.append(image)
        if len(tiles) < _TILES and number + 1 < len(shown):
            continue
        sheet = _encode(tiles, side, quality)
        left -= len(sheet)
        if left < 0:
            break
        first = len(sheets) * _TILES
        places[shown[first : number + 1]] = np.arange(first, number + 1)
        sheets.append(sheet)
        tiles = []
    return Thumbnails(side, sheets, places, sizes)


def _small(read: Read, indices: Int[np.ndarray, 'n'], side: int) -> Iterable[np.ndarray]:
    """Yields images reduced to at most `side` pixels, as RGB; others show their first channel."""

    def small(index: int) -> np.ndarray:
        image = read(index)
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        picture.thumbnail((side, side))
        return np.asarray(picture.convert('RGB'))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(indices), _TILES):  # bounds the images in memory
            yield from threads.map(small, indices[start : start + _TILES].tolist())


def _encode(images: list[np.ndarray], side: int, quality: int | None) -> bytes:
    """Returns a WebP of images in tiles, reduced to them if necessary; lossless without quality."""
    columns = min(COLUMNS, len(images))
    sheet = np.zeros((-(-len(images) // columns) * side, columns * side, 3), np.uint8)
    for place, image in enumerate(images):
        if max(image.shape[:2]) > side:
            picture = Image.fromarray(image)
            picture.thumbnail((side, side))
            image = np.asarray(picture)
        y, x = (side * i for i in divmod(place, columns))
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    buffer = io.BytesIO()
    options = {'lossless': True, 'quality': 50} if quality is None else {'quality': quality}
    Image.fromarray(sheet).save(buffer, 'webp', method=4, **options)
    return buffer.getvalue()
