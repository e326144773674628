"""Which files are images that this environment reads."""

import importlib.util
import os
from collections.abc import Mapping

from simsiam_jax import paths

EXTENSIONS = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.npy'),
    *('.avif', '.jp2', '.ppm', '.pgm', '.pbm', '.pnm', '.tga', '.ico'),
)

# Extensions that an extra reads: the package that it installs, and its name.
EXTRAS = {
    '.heic': ('pillow_heif', 'heic'),
    '.heif': ('pillow_heif', 'heic'),
    '.dcm': ('pydicom', 'dicom'),
}

_HINTS = {
    **{kind: f"pip install 'simsiam_jax[{extra}]'" for kind, (_, extra) in EXTRAS.items()},
    '.zip': 'use zip:FILE',
    '.tar': 'use tar:FILE',
    '.parquet': 'use parquet:FILE',
    '.npz': 'use npz:FILE',
    '.tfrecord': 'use tfds:NAME/SPLIT',
    '.jxl': 'convert them to PNG',
}

HEAD = 132  # bytes of a file that begins_like_image needs
_BEGINNINGS = (
    *(b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF87a', b'GIF89a', b'\x93NUMPY'),
    *(b'II*\0', b'MM\0*', b'II+\0', b'MM\0+', b'\0\0\0\x0cjP  \r\n\x87\n'),
)


def readable() -> frozenset[str]:
    """Returns the extensions of the images that this environment reads."""
    extra = (kind for kind, (package, _) in EXTRAS.items() if importlib.util.find_spec(package))
    return frozenset((*EXTENSIONS, *extra))


def extension(name: str) -> str:
    """Returns the extension in lower case; '' if the name has none, or one without letters."""
    found = os.path.splitext(name)[1].lower()
    return found if any(map(str.isalpha, found)) else ''


def begins_like_image(head: bytes, kinds: frozenset[str]) -> bool:
    """Returns whether a file without an extension is an image.

    Args:
      head: First HEAD bytes of the file.
      kinds: Extensions of images that can be read.
    """
    brand = head[8:12] if head[4:8] == b'ftyp' else b''
    return (
        head.startswith(_BEGINNINGS)
        or (head[:4] == b'RIFF' and head[8:12] == b'WEBP')
        or (head[:2] == b'BM' and head[6:10] == bytes(4))
        or (head[:2] in (b'P4', b'P5', b'P6') and head[2:3].isspace())
        or brand == b'avif'
        or (brand in (b'heic', b'heix', b'mif1') and '.heic' in kinds)
        or (head[128:132] == b'DICM' and '.dcm' in kinds)
    )


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Returns the number of skipped files by extension, and how to read them if they are images."""
    kinds = sorted(skipped, key=lambda kind: (kind not in _HINTS, -skipped[kind], kind))
    counts = [
        f'{skipped[kind]:,} {paths.printable(kind) or "without extension"}'
        + (f' ({_HINTS[kind]})' if kind in _HINTS else '')
        for kind in kinds[:8]
    ]
    return ', '.join(counts) + (f' and {len(kinds) - 8} more kinds' if len(kinds) > 8 else '')
