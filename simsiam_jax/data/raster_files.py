"""Reads image files of all formats as they are stored."""

import importlib
import io
import re
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from simsiam_jax.data import tiff
from simsiam_jax.data.raster import Raster, check_pixels, of_array, orientation_of, split_alpha

# PIL opens far more formats, some of them with other programs.
_FORMATS = (
    'JPEG',
    'PNG',
    'WEBP',
    'GIF',
    'BMP',
    'DIB',
    'TIFF',
    'AVIF',
    'JPEG2000',
    'PPM',
    'ICO',
    'TGA',
)
_HEIF = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'mif1', b'msf1')
_JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'


# The orientation as an entry of EXIF: tag, type, count and value, big-endian or little-endian.
_ORIENTATION = re.compile(rb'\x01\x12\0\x03\0{3}\x01\0(.)|\x12\x01\x03\0\x01\0{3}(.)\0', re.DOTALL)


def read(encoded: bytes, *, luminance: bool = False) -> Raster:
    """Reads an image file.

    Args:
      encoded: Content of the file.
      luminance: Whether a color JPEG is read as gray.

    Raises:
      ValueError: The file is damaged, not an image, of a kind that is not read, or too large.
    """
    try:
        return _read(encoded, luminance)
    except ValueError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError('unknown image format') from error
    # Damaged files raise errors of any type from the libraries.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _read(encoded: bytes, luminance: bool) -> Raster:
    if encoded[:3] == _JPEG and (raster := _read_jpeg(encoded, luminance)):
        return raster
    if encoded[:6] == b'\x93NUMPY':
        return _read_npy(encoded)
    if encoded[128:132] == b'DICM':
        return _read_dicom(encoded)
    if encoded[:4] in tiff.MAGIC and (raster := tiff.read(encoded)):
        return raster
    if encoded[:8] == _PNG and encoded[24] == 16:
        return _read_deep_png(encoded)
    return _read_pil(encoded)


def may_be_deep(encoded: bytes) -> bool:
    """Returns False for an image file that is known, without decoding it, not to be deep."""
    if encoded[:8] == _PNG:
        return encoded[24] == 16
    return encoded[:3] not in (_JPEG, b'GIF') and encoded[:2] != b'BM' and encoded[:4] != b'RIFF'


def _read_jpeg(encoded: bytes, luminance: bool) -> Raster | None:
    """Returns the image as simplejpeg reads it; None if PIL has to, for CMYK and stray bytes."""
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    check_pixels(height, width)
    if colors in ('CMYK', 'YCCK'):
        return None
    colorspace = 'GRAY' if luminance or colors == 'Gray' else 'RGB'
    try:
        # strict rejects stray bytes too; PIL rejects only truncation.
        values = simplejpeg.decode_jpeg(encoded, colorspace=colorspace, strict=True)
    except ValueError:
        return None
    return Raster(values, orientation=_jpeg_orientation(encoded))


def _jpeg_orientation(encoded: bytes) -> int:
    """Returns the EXIF orientation in the blocks at the start of a JPEG file; 1 if there is none.

    Much faster than parsing EXIF, which most photographs of a large set have.
    """
    position = 2
    while position + 4 < len(encoded) and 0xE0 <= encoded[position + 1] <= 0xEF:
        end = position + 2 + int.from_bytes(encoded[position + 2 : position + 4], 'big')
        if encoded.startswith(b'Exif\0\0', position + 4):
            entry = _ORIENTATION.search(encoded, position + 10, end)
            value = (entry[1] or entry[2])[0] if entry else 1
            return value if 1 <= value <= 8 else 1
        position = end
    return 1


def _read_npy(encoded: bytes) -> Raster:
    array = np.load(io.BytesIO(encoded), allow_pickle=False)
    return of_array(array[..., None] if array.ndim == 2 else array)


def _read_dicom(encoded: bytes) -> Raster:
    pydicom = _extra('pydicom', 'pydicom', 'DICOM files')
    from pydicom.pixels import apply_rescale

    data = pydicom.dcmread(io.BytesIO(encoded))
    frames = int(data.get('NumberOfFrames', 1) or 1)
    check_pixels(int(data.Rows), int(data.Columns), int(data.SamplesPerPixel) * frames)
    array = data.pixel_array  # RGB where the file has YBR
    array = array[0] if frames > 1 else array
    if data.PhotometricInterpretation == 'PALETTE COLOR':
        from pydicom.pixels import apply_color_lut

        array = apply_color_lut(array, data)
    if array.ndim == 3:
        return of_array(array)
    bits = int(data.BitsStored)
    if data.PhotometricInterpretation == 'MONOCHROME1':  # the lowest value is white
        array = (array.max() if data.PixelRepresentation else 2**bits - 1) - array
    rescaled = apply_rescale(array, data)
    if rescaled.dtype.kind == 'f' and (rescaled == np.round(rescaled)).all():
        rescaled = rescaled.astype(np.int32)
    return of_array(rescaled[..., None], bits if rescaled.dtype == array.dtype else 0)


def _read_deep_png(encoded: bytes) -> Raster:
    """Reads a PNG file of 16 bits; PIL would keep only 8 of color."""
    import imagecodecs

    height, width = (int.from_bytes(encoded[i : i + 4], 'big') for i in (20, 16))
    check_pixels(height, width)
    array = imagecodecs.png_decode(encoded)
    raster = of_array(array if array.ndim == 3 else array[..., None])
    return split_alpha(raster, False) if raster.values.shape[-1] in (2, 4) else raster


def _read_pil(encoded: bytes) -> Raster:
    # Annotation tools write megabytes of text into PNG files, whose reading PIL would refuse.
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 2**24)
    formats: tuple[str, ...] = _FORMATS
    if encoded[4:8] == b'ftyp' and encoded[8:12] in _HEIF:
        _extra('pillow_heif', 'pillow-heif', 'HEIC files').register_heif_opener()
        formats = ('HEIF', 'AVIF')
    with Image.open(io.BytesIO(encoded), formats=formats) as image:
        check_pixels(image.height, image.width)
        orientation = orientation_of(image.getexif)
        if image.mode == 'F':
            return of_array(np.asarray(image)[..., None])
        if image.mode.startswith('I'):  # 16 bits, in 32 for some formats
            values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
            return Raster(values[..., None], 16, orientation=orientation)
        colors = 'L' if image.mode in ('1', 'L', 'LA', 'La') else 'RGB'
        alpha = None
        if image.has_transparency_data:
            whole = image.convert('RGBA')
            alpha = np.asarray(whole.getchannel('A'))
            values = np.asarray(whole.convert('RGB').convert(colors))
        else:
            values = np.asarray(image.convert(colors))
    values = np.ascontiguousarray(values.reshape(*values.shape[:2], -1))
    return Raster(values, 8, None if alpha is None or alpha.min() == 255 else alpha, orientation)


def _extra(module: str, package: str, what: str) -> Any:
    """Returns a module that only some files need.

    Raises:
      ValueError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{what} need {package}: pip install {package}') from error
