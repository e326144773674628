"""Decodes images to uint8 arrays without holding Python's global lock."""

import io

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**27


def decode(encoded: bytes, channels: int) -> UInt8[np.ndarray, 'H W C']:
    """Decodes a JPEG, PNG, BMP, GIF (first frame), WebP, TIFF or .npy file.

    Gray images are converted to RGB and RGB to gray to match `channels`. Alpha is dropped unless
    `channels` is 4, and 16 bits become 8. TIFF and .npy files may have any number of channels if
    it equals `channels`. Float .npy arrays contain values in [0, 1].

    Raises:
      ValueError: The file is damaged, not an image, has other channels or exceeds MAX_PIXELS.
    """
    try:
        return _decode(encoded, channels)
    except ValueError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError('unknown image format') from error
    # Damaged files raise errors of any type from the libraries.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _decode(encoded: bytes, channels: int) -> UInt8[np.ndarray, 'H W C']:
    if encoded[:3] == b'\xff\xd8\xff' and channels in (1, 3) and _fits_simplejpeg(encoded):
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(
                encoded, colorspace='GRAY' if channels == 1 else 'RGB', strict=True
            )
        except ValueError:
            pass  # simplejpeg rejects stray bytes too; PIL rejects only truncation
    if encoded[:6] == b'\x93NUMPY':
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
        return _fit(array if array.ndim == 3 else array[..., None], channels)
    if encoded[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+') and channels not in (1, 3):
        import tifffile

        array = tifffile.imread(io.BytesIO(encoded))
        return _fit(array if array.ndim == 3 else array[..., None], channels)
    return _decode_pil(encoded, channels)


def _fits_simplejpeg(encoded: bytes) -> bool:
    """Returns whether simplejpeg should read this JPEG; PIL handles CMYK and odd subsampling."""
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return False
    _check_pixels(height, width)
    return colors not in ('CMYK', 'YCCK')


def _check_pixels(height: int, width: int) -> None:
    # A damaged header may claim gigapixels.
    if height * width > MAX_PIXELS:
        raise ValueError(f'{height}x{width} pixels; expected at most {MAX_PIXELS} in total')


def _decode_pil(encoded: bytes, channels: int) -> UInt8[np.ndarray, 'H W C']:
    modes = {1: 'L', 3: 'RGB', 4: 'RGBA'}
    if channels not in modes:
        raise ValueError(f'only TIFF and .npy files may have {channels} channels')
    with Image.open(io.BytesIO(encoded)) as image:
        _check_pixels(image.height, image.width)
        if image.mode.startswith('I') or image.mode == 'F':
            whole: Image.Image = Image.fromarray(_to_uint8(np.asarray(image)))
        else:
            whole = image
        if channels != 4:
            whole.info.pop('transparency', None)  # PIL would warn that it is dropped
        array = np.asarray(whole.convert(modes[channels]))
    return array.reshape(*array.shape[:2], channels)


def _fit(array: Num[np.ndarray, '...'], channels: int) -> UInt8[np.ndarray, 'H W C']:
    if array.ndim != 3 or array.shape[-1] != channels or 0 in array.shape:
        raise ValueError(f'shape {array.shape}; expected [H, W, {channels}]')
    return _to_uint8(array)


def _to_uint8(array: Num[np.ndarray, '...']) -> UInt8[np.ndarray, '...']:
    array = array.astype(array.dtype.newbyteorder('='), copy=False)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError('contains values that are not finite')
        array = np.clip(array.astype(np.float32), 0, 1) * 255
    elif array.dtype in (np.uint16, np.int32):  # PIL's mode I contains 16 bits
        array = np.clip(array, 0, 65535) * np.float32(255 / 65535)
    else:
        raise ValueError(f'dtype {array.dtype}; expected uint8, uint16 or float')
    return np.ascontiguousarray(np.round(array).astype(np.uint8))
