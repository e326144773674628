"""Tests of data/raster_files.py, tiff.py, decode.py, value_range.py and sample_statistics.py."""

import io
import pathlib
import re
import sys

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
import tifffile
from configurations import load
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data import (
    image_files,
    raster_files,
    sample_statistics,
    sources,
    value_range,
)
from simsiam_jax.data.decode import Decoding, decode
from simsiam_jax.data.survey import survey
from simsiam_jax.data.value_range import ValueRange
from simsiam_jax.tasks import inputs, pretrain

H, W = 24, 20


def image(channels: int = 3) -> np.ndarray:
    """Returns smooth uint8 channels, all of them different, from 0 to 255."""
    y, x = np.mgrid[:H, :W]
    planes = [y * 255 // (H - 1), x * 255 // (W - 1), (x + y) * 255 // (H + W - 2)]
    planes += [255 - plane for plane in planes]
    return np.stack(planes[:channels], -1).astype(np.uint8)


RGB, GRAY, FIVE = image(), image(1), image(5)
RGBA = np.concatenate([RGB, np.where(np.arange(W) < 10, 255, 64)[None, :, None].repeat(H, 0)], -1)
RGBA = RGBA.astype(np.uint8)


def pil(array: np.ndarray, kind: str, mode: str = '', **options) -> bytes:
    file = io.BytesIO()
    picture = PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, photometric: str = '', **options) -> bytes:
    file = io.BytesIO()
    kind = photometric or ('rgb' if array.shape[-1] in (3, 4) else 'minisblack')
    if array.shape[-1] == 1:
        array = array[..., 0]
    elif 'planarconfig' not in options and kind == 'minisblack' and array.ndim == 3:
        options['planarconfig'] = 'contig'
    tifffile.imwrite(file, array, photometric=kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def planes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def pages(*arrays: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for array in arrays:
            kind = 'rgb' if array.ndim == 3 else 'minisblack'
            writer.write(array, photometric=kind, metadata=None, **options)
    return file.getvalue()


def pyramid() -> bytes:
    file = io.BytesIO()
    large = RGB.repeat(4, 0).repeat(4, 1)
    with tifffile.TiffWriter(file) as writer:
        writer.write(large, photometric='rgb', tile=(32, 32), subifds=2)
        writer.write(large[::2, ::2].copy(), photometric='rgb', subfiletype=1)
        writer.write(large[::4, ::4].copy(), photometric='rgb', subfiletype=1)
    return file.getvalue()


def palette(**options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(RGB).quantize(64).save(file, 'png', **options)
    return file.getvalue()


QUANTIZED = np.asarray(PIL.Image.fromarray(RGB).quantize(64).convert('RGB'))
COLORMAP = np.stack([np.arange(256) * 257, np.arange(256)[::-1] * 257, np.arange(256) * 0])
DEEP = RGB.astype(np.uint16) * 257
BLACK_AND_WHITE = np.where(GRAY > 127, 255, 0).astype(np.uint8)
LARGE = RGB.repeat(4, 0).repeat(4, 1)
TWELVE = (RGB.astype(np.uint32) * 4095 // 255).astype(np.uint16)  # 12 bits in 16
FLOATS = (RGB / 255).astype(np.float32)

# Name -> encoded image and its pixels.
EXACT = {
    'png': (pil(RGB, 'png'), RGB),
    'png gray': (pil(GRAY, 'png'), GRAY),
    'png palette': (palette(), QUANTIZED),
    'png 1 bit': (pil(BLACK_AND_WHITE, 'png', '1'), BLACK_AND_WHITE),
    'png 16 bits gray': (pil(DEEP[..., :1], 'png'), GRAY),
    'bmp': (pil(RGB, 'bmp'), RGB),
    'bmp gray': (pil(GRAY, 'bmp'), GRAY),
    'gif': (pil(GRAY, 'gif'), GRAY.repeat(3, -1)),
    'webp': (pil(RGB, 'webp', lossless=True), RGB),
    'ppm': (pil(RGB, 'ppm'), RGB),
    'pgm': (pil(GRAY, 'ppm'), GRAY),
    'pgm 16 bits': (b'P5 20 24 65535\n' + DEEP[..., 0].astype('>u2').tobytes(), GRAY),
    'pbm': (pil(BLACK_AND_WHITE, 'ppm', '1'), BLACK_AND_WHITE),
    'tga': (pil(RGB, 'tga'), RGB),
    'tga compressed': (pil(RGB, 'tga', compression='tga_rle'), RGB),
    'ico': (pil(RGB, 'ico', sizes=[(W, H)]), RGB),
    'jpeg 2000': (pil(RGB, 'jpeg2000'), RGB),
    'jpeg 2000 gray 16 bits': (pil(DEEP[..., :1], 'jpeg2000'), GRAY),
    'tiff': (tiff(RGB), RGB),
    'tiff gray': (tiff(GRAY), GRAY),
    'tiff by PIL': (pil(RGB, 'tiff'), RGB),
    'tiff big-endian': (tiff(RGB, byteorder='>'), RGB),
    'tiff big': (tiff(RGB, bigtiff=True), RGB),
    'tiff planar': (tiff(planes(RGB), 'rgb', planarconfig='separate'), RGB),
    'tiff planar 16 bits': (tiff(planes(DEEP), 'rgb', planarconfig='separate'), RGB),
    'tiff 16 bits': (tiff(DEEP), RGB),
    'tiff 16 bits gray': (tiff(DEEP[..., :1]), GRAY),
    'tiff 16 bits big-endian': (tiff(DEEP, byteorder='>'), RGB),
    'tiff 32 bits': (tiff(RGB.astype(np.uint32) * 16843009), RGB),
    'tiff int16': (tiff((DEEP.astype(np.int32) - 32768).astype(np.int16)), RGB),
    'tiff int8': (tiff((GRAY.astype(np.int16) - 128).astype(np.int8)), GRAY),
    'tiff float16': (tiff(BLACK_AND_WHITE.astype(np.float16) / 255), BLACK_AND_WHITE),
    'tiff float32': (tiff(FLOATS), RGB),
    'tiff float64': (tiff(RGB / 255), RGB),
    'tiff white is zero': (tiff(255 - GRAY, 'miniswhite'), GRAY),
    'tiff white is zero 16 bits': (tiff(65535 - DEEP[..., :1], 'miniswhite'), GRAY),
    'tiff 1 bit': (tiff(GRAY > 127, 'minisblack'), BLACK_AND_WHITE),
    'tiff 1 bit white is zero': (tiff(GRAY <= 127, 'miniswhite'), BLACK_AND_WHITE),
    'tiff 12 bits packed': (tiff((GRAY * 16.06).astype(np.uint16), bitspersample=12), GRAY),
    'tiff palette': (
        tiff(GRAY, 'palette', colormap=COLORMAP.astype(np.uint16)),
        np.concatenate([GRAY, 255 - GRAY, 0 * GRAY], -1),
    ),
    'tiff tiled': (tiff(LARGE, tile=(16, 16)), LARGE),
    'tiff strips': (tiff(LARGE, rowsperstrip=5), LARGE),
    'tiff pyramid': (pyramid(), LARGE),
    'tiff thumbnail first': (pages(RGB, LARGE), LARGE),
    'tiff lzw': (tiff(RGB, compression='lzw'), RGB),
    'tiff lzw predictor': (tiff(DEEP, compression='lzw', predictor=True), RGB),
    'tiff deflate': (tiff(RGB, compression='zlib'), RGB),
    'tiff deflate floats': (tiff(FLOATS, compression='zlib', predictor=True), RGB),
    'tiff packbits': (tiff(RGB, compression='packbits'), RGB),
    'tiff zstd': (tiff(RGB, compression='zstd'), RGB),
    'tiff lzma': (tiff(RGB, compression='lzma'), RGB),
    'tiff jpeg 2000': (tiff(RGB, compression='jpeg2000'), RGB),
    'tiff webp': (tiff(RGB, compression='webp', compressionargs={'lossless': True}), RGB),
    'tiff group 4': (pil(BLACK_AND_WHITE, 'tiff', '1', compression='group4'), BLACK_AND_WHITE),
    'tiff pages of color': (tiff(np.stack([RGB, 255 - RGB])), RGB),
    'tiff pages of color, no metadata': (pages(RGB, 255 - RGB), RGB),
    'tiff 5 bands': (tiff(FIVE), FIVE),
    'tiff 5 bands as planes': (tiff(planes(FIVE), 'minisblack', planarconfig='separate'), FIVE),
    'tiff 5 bands as pages': (pages(*planes(FIVE)), FIVE),
    'tiff 5 bands as pages of tifffile': (tiff(planes(FIVE), planarconfig=None), FIVE),
    'tiff 5 bands of floats': (tiff((FIVE / 255).astype(np.float32)), FIVE),
    'tiff 5 bands of 16 bits': (tiff(FIVE.astype(np.uint16) * 257, bigtiff=True), FIVE),
    'tiff 2 bands': (tiff(RGB[..., :2]), RGB[..., :2]),
    'tiff array of 5 bands': (tiff(FIVE, planarconfig=None), FIVE),
    'tiff color and infrared': (tiff(image(4), extrasamples=['unspecified']), image(4)),
    'tiff channels of ImageJ': (
        tiff(planes(FIVE), imagej=True, planarconfig=None, metadata={'axes': 'CYX'}),
        FIVE,
    ),
    'tiff stack of ImageJ': (
        tiff(planes(FIVE), imagej=True, planarconfig=None, metadata={'axes': 'ZYX'}),
        GRAY,
    ),
    'tiff channels of OME': (
        tiff(planes(FIVE), ome=True, planarconfig=None, metadata={'axes': 'CYX'}),
        FIVE,
    ),
    'tiff 40 pages': (pages(*[GRAY[..., 0]] * 40), GRAY),
    'npy': (npy(RGB), RGB),
    'npy gray': (npy(GRAY[..., 0]), GRAY),
    'npy bool': (npy(GRAY > 127), BLACK_AND_WHITE),
    'npy int16': (npy((DEEP.astype(np.int32) - 32768).astype(np.int16)), RGB),
    'npy big-endian floats': (npy(FLOATS.astype('>f4')), RGB),
    'npy 5 channels': (npy(FIVE), FIVE),
}


# Name -> encoded image and its pixels, which compression changes a little.
LOSSY = {
    'jpeg': (pil(RGB, 'jpeg', quality=95), RGB),
    'jpeg gray': (pil(GRAY, 'jpeg', quality=95), GRAY),
    'jpeg progressive': (pil(RGB, 'jpeg', quality=95, progressive=True), RGB),
    'jpeg of four inks': (pil(RGB, 'jpeg', 'CMYK', quality=95), RGB),
    'avif': (pil(RGB, 'avif', quality=95), RGB),
    'webp lossy': (pil(RGB, 'webp', quality=95), RGB),
    'tiff jpeg': (tiff(LARGE, compression='jpeg', compressionargs={'level': 95}), LARGE),
    'tiff jpeg tiled': (
        tiff(LARGE, compression='jpeg', compressionargs={'level': 95}, tile=(32, 32)),
        LARGE,
    ),
    'tiff jpeg gray': (tiff(GRAY, compression='jpeg', compressionargs={'level': 95}), GRAY),
    'tiff of four inks': (pil(RGB, 'tiff', 'CMYK'), RGB),
}


@pytest.mark.parametrize('name', EXACT)
def test_decode_gives_the_pixels(name: str) -> None:
    encoded, expected = EXACT[name]
    # The survey reads the same raster, so it sees the same channels.
    assert raster_files.read(encoded).values.shape == expected.shape
    decoded = decode(encoded, expected.shape[-1])
    np.testing.assert_array_equal(decoded, expected)
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize('name', LOSSY)
def test_decode_gives_about_the_pixels(name: str) -> None:
    encoded, expected = LOSSY[name]
    assert raster_files.read(encoded).values.shape == expected.shape
    difference = decode(encoded, expected.shape[-1]).astype(int) - expected
    assert np.abs(difference).mean() < 5


def oriented(kind: str, orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    if kind == 'deep tiff':
        return tiff(DEEP, extratags=[(274, 3, 1, orientation, True)])
    options = {'jpeg': {'quality': 95}, 'webp': {'lossless': True}}.get(kind, {})
    return pil(RGB, kind, exif=exif, **options)


ORIENTED = [(k, o) for k in ('jpeg', 'png', 'webp', 'tiff', 'deep tiff') for o in range(1, 9)]


@pytest.mark.parametrize(('kind', 'orientation'), ORIENTED)
def test_decode_applies_orientation(kind: str, orientation: int) -> None:
    picture = PIL.Image.fromarray(RGB)
    picture.getexif()[0x0112] = orientation
    upright = np.asarray(PIL.ImageOps.exif_transpose(picture))
    encoded = oriented(kind, orientation)
    for decoding, expected in ((Decoding(), upright), (Decoding(orientation=False), RGB)):
        decoded = decode(encoded, 3, decoding).astype(int)
        assert decoded.shape == expected.shape
        assert np.abs(decoded - expected).mean() < (5 if kind == 'jpeg' else 1e-9)


def test_decode_ignores_damaged_orientation() -> None:
    jpeg = oriented('jpeg', 6)
    start = jpeg.index(b'Exif') + 6
    tag = jpeg.index(b'\x06', start + 8)
    for position, value in ((tag, 99), (start, 0), (start + 4, 255)):
        damaged = bytearray(jpeg)
        damaged[position] = value
        assert decode(bytes(damaged), 3).size == RGB.size


DEEP_RGBA = RGBA.astype(np.uint16) * 257
GRAY_ALPHA = np.concatenate([GRAY, RGBA[..., 3:]], -1)
PREMULTIPLIED = np.round(DEEP * (RGBA[..., 3:] / 255)).astype(np.uint16)
PREMULTIPLIED = np.concatenate([PREMULTIPLIED, DEEP_RGBA[..., 3:]], -1)
TRANSPARENT = {
    'png': pil(RGBA, 'png'),
    'webp': pil(RGBA, 'webp', lossless=True, exact=True),
    'tiff': tiff(RGBA, extrasamples=['unassalpha']),
    'tiff by PIL': pil(RGBA, 'tiff'),
    'png 16 bits': imagecodecs.png_encode(DEEP_RGBA),
    'tiff 16 bits': tiff(DEEP_RGBA, extrasamples=['unassalpha']),
    'tiff premultiplied': tiff(PREMULTIPLIED, extrasamples=['assocalpha']),
    'tga': pil(RGBA, 'tga'),
}


@pytest.mark.parametrize('name', TRANSPARENT)
def test_decode_blends_with_background(name: str) -> None:
    encoded = TRANSPARENT[name]
    assert raster_files.read(encoded).values.shape == RGB.shape
    opacity = RGBA[..., 3:] / 255
    for background in ((0,), (255, 0, 255)):
        expected = RGB * opacity + np.array(background) * (1 - opacity)
        decoded = decode(encoded, 3, Decoding(background=background))
        np.testing.assert_allclose(decoded, expected, rtol=0, atol=1)
    np.testing.assert_allclose(decode(encoded, 3, Decoding(background=())), RGB, rtol=0, atol=2)
    np.testing.assert_allclose(decode(encoded, 4), RGBA, rtol=0, atol=2)
    blended = PIL.Image.fromarray(decode(encoded, 3)).convert('L')
    np.testing.assert_allclose(decode(encoded, 1)[..., 0], blended, rtol=0, atol=2)


def test_decode_transparent_colors() -> None:
    gray = decode(pil(GRAY_ALPHA, 'png'), 1, Decoding(background=(255,)))
    opacity = RGBA[..., 3:] / 255
    np.testing.assert_allclose(gray, GRAY * opacity + 255 * (1 - opacity), rtol=0, atol=1)
    clear = palette(transparency=bytes(64))
    behind = decode(clear, 3, Decoding(background=(9, 8, 7)))
    np.testing.assert_array_equal(behind, np.broadcast_to([9, 8, 7], RGB.shape))
    np.testing.assert_array_equal(decode(clear, 3, Decoding(background=())), QUANTIZED)


def test_decode_heic() -> None:
    heif = pytest.importorskip('pillow_heif')
    file = io.BytesIO()
    heif.from_pillow(PIL.Image.fromarray(LARGE)).save(file, quality=95)
    assert np.abs(decode(file.getvalue(), 3).astype(int) - LARGE).mean() < 5


def dicom(array: np.ndarray, **attributes) -> bytes:
    pydicom = pytest.importorskip('pydicom')
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = array.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, 'MONOCHROME2'
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = int(array.dtype.kind == 'i')
    data.PixelData = array.tobytes()
    for name, value in attributes.items():
        setattr(data, name, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_decode_dicom() -> None:
    stored = TWELVE[..., 0]
    np.testing.assert_allclose(decode(dicom(stored), 1), GRAY, atol=1)
    inverted = dicom(4095 - stored, PhotometricInterpretation='MONOCHROME1')
    np.testing.assert_allclose(decode(inverted, 1), GRAY, atol=1)
    hounsfield = dicom(stored, RescaleSlope=2, RescaleIntercept=-1024)
    window = Decoding(value_range.parse('-1024,7166', 1))
    np.testing.assert_allclose(decode(hounsfield, 1, window), GRAY, atol=1)
    assert raster_files.read(hounsfield).values.min() == -1024
    frames = dicom(np.stack([stored, 4095 - stored]), NumberOfFrames=2)
    np.testing.assert_allclose(decode(frames, 1), GRAY, atol=1)


@pytest.mark.parametrize('missing', ['pillow_heif', 'pydicom'])
def test_decode_names_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = {'pillow_heif': b'\0\0\0\x18ftypheic', 'pydicom': bytes(128) + b'DICM'}[missing]
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f'pip install {missing.replace("_", "-")}'):
        decode(encoded, 3)


def test_decode_png_with_megabytes_of_text() -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text('annotation', 'x' * 5_000_000, zip=True)
    np.testing.assert_array_equal(decode(pil(RGB, 'png', pnginfo=info), 3), RGB)


# Name -> encoded image, channels, and the message.
REJECTED = {
    'empty': (b'', 3, 'unknown image format'),
    'text': (b'a,b,c\n1,2,3\n', 3, 'unknown image format'),
    'pdf': (b'%PDF-1.4', 3, 'unknown image format'),
    'postscript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 3, 'unknown image format'),
    'npy of channels first': (npy(planes(FIVE)), 5, r'shape \(5, 24, 20\); expected \[H, W, 5\]'),
    'npy of a batch': (npy(RGB[None]), 3, r'shape \(1, 24, 20, 3\)'),
    'npy of complex': (npy(RGB.astype(complex)), 3, 'dtype complex128'),
    'npy without pixels': (npy(RGB[:0]), 3, r'shape \(0, 20, 3\)'),
    'tiff of complex': (tiff(GRAY.astype(np.complex64)), 1, 'dtype complex64'),
    'tiff of 5 bands as color': (tiff(FIVE), 3, r'shape \(24, 20, 5\); expected \[H, W, 3\]'),
    'jpeg as 5 channels': (pil(RGB, 'jpeg'), 5, r'shape \(24, 20, 3\); expected \[H, W, 5\]'),
}


@pytest.mark.parametrize('name', REJECTED)
def test_decode_says_what_is_wrong(name: str) -> None:
    encoded, channels, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        decode(encoded, channels)


def write(root: pathlib.Path, arrays: list[np.ndarray]) -> str:
    root.mkdir(exist_ok=True)
    for i, array in enumerate(arrays):
        (root / f'{i:02}.tif').write_bytes(tiff(array))
    return f'folder:{root}'


def data_section(channels: int, **keys) -> ConfigDict:
    data = config_lib.default().data
    data.channels = channels
    data.update(keys)
    return data


@pytest.mark.parametrize(
    ('array', 'low', 'high'),
    [
        (TWELVE, 0, 4095),
        ((TWELVE.astype(np.int32) - 1024).astype(np.int16), -1024, 3071),
        (TWELVE.astype(np.float32) * 2, 0, 8190),
        (TWELVE.astype(np.float32) / 4095, 0, 1),
        (TWELVE.astype(np.float64) * 1e6 + 1e12, 1e12, 1e12 + 4095e6),
        (TWELVE.astype(np.uint32) * 1000, 0, 4095000),
    ],
    ids=['12 bits', 'signed', 'floats', 'floats to 1', 'doubles', '32 bits'],
)
@pytest.mark.parametrize('backend', ['resident', 'host'])
def test_auto_range_keeps_all_levels(array, low, high, backend, tmp_path, capsys) -> None:
    spec = write(tmp_path / 'deep', [array] * 5)
    data = data_section(3, backend=backend)
    source = inputs.open_source(spec, data)
    stored = value_range.parse(data.range, 3)
    np.testing.assert_allclose(stored.low, [low] * 3, atol=0.002 * (high - low), rtol=0)
    np.testing.assert_allclose(stored.high, [high] * 3, atol=0.002 * (high - low), rtol=0)
    assert f'5 sampled images of other types than 8 bits, by channel: {data.range}' in (
        capsys.readouterr().out
    )
    decoded = source.images[0] if backend == 'resident' else source.read(0)[0]
    np.testing.assert_allclose(decoded, RGB, atol=1, rtol=0)


def test_auto_range_leaves_8_bits(tmp_path) -> None:
    data = data_section(3)
    source = inputs.open_source(write(tmp_path / 'plain', [RGB // 4] * 3), data)
    assert data.range == 'dtype'
    np.testing.assert_array_equal(source.images[0], RGB // 4)
    mixed = write(tmp_path / 'plain', [RGB // 4, TWELVE])
    source = inputs.open_source(mixed, data_section(3))
    np.testing.assert_array_equal(source.images[0], RGB // 4)
    np.testing.assert_allclose(source.images[1], RGB, atol=4, rtol=0)


def test_auto_range_counts_nan_and_ignores_transparent_pixels(tmp_path, capsys) -> None:
    array = TWELVE.astype(np.float32)
    array[:2, :, 0] = np.nan
    array[2, 0] = np.inf
    data = data_section(3)
    source = inputs.open_source(write(tmp_path / 'nan', [array]), data)
    missing = np.mean(~np.isfinite(array))
    assert f'{missing:.2%} are not finite' in capsys.readouterr().out
    assert (source.images[0][:2, :, 0] == 0).all()
    assert (source.images[0][2, 0] == 255).all()
    np.testing.assert_allclose(source.images[0][3:, :, 1:], RGB[3:, :, 1:], atol=4, rtol=0)
    clear = DEEP_RGBA.copy()
    clear[:3] = [65535, 65535, 65535, 0]
    clear[3:, :, :3] //= 4
    (tmp_path / 'clear').mkdir()
    (tmp_path / 'clear' / '0.png').write_bytes(imagecodecs.png_encode(clear))
    inputs.open_source(f'folder:{tmp_path}/clear', data := data_section(3))
    assert max(value_range.parse(data.range, 3).high) < 65535 / 4 + 1


def test_resumed_run_measures_nothing_again(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 4095, (8, 8, 1), np.uint16) for _ in range(16)]
    config = load('quickstart')
    config.data.update(source=write(tmp_path / 'deep', images), normalize='auto', backend='host')
    config.eval.train = config.eval.test = ''
    config.update(batch_size=16, epochs=1, guard='off')
    config.model.update(stages=(1,), width_multiplier=0.125)
    pretrain.run(config.copy_and_resolve_references(), str(tmp_path / 'run'))
    stored = checkpoint_reader.newest_run(tmp_path / 'run').config
    low, high = map(float, stored['data']['range'].split(','))
    assert (low < 50, high > 4000) == (True, True)

    def fail(*_) -> None:
        raise AssertionError('measured again')

    for name in ('measure_range', 'measure_normalization'):
        monkeypatch.setattr(sample_statistics, name, fail)
    config.data.orientation = False
    pretrain.run(config, str(tmp_path / 'run'))
    assert config.data.orientation
    assert config.augment.mean == tuple(stored['augment']['mean'])
    with pytest.raises(AssertionError, match='measured again'):
        pretrain.run(config, str(tmp_path / 'other'))


def test_range_by_channel_and_errors() -> None:
    by_channel = value_range.parse('0,4095,0,8190,-4095,4095', 3)
    expected = np.stack([RGB[..., 0], RGB[..., 1] // 2, 127.5 + RGB[..., 2] / 2], -1)
    decoded = decode(tiff(TWELVE), 3, Decoding(by_channel))
    np.testing.assert_allclose(decoded, expected, atol=1, rtol=0)
    assert str(by_channel) == '0,4095,0,8190,-4095,4095'
    for text in ('', 'automatic', '0', '1,0', '0,nan', '0,1,0,1', '0,1,2', '0,inf'):
        with pytest.raises(errors.UserError, match=r'config\.data\.range is'):
            value_range.parse(text, 3)
    for background in ((0, 0), (256,), (-1,)):
        with pytest.raises(errors.UserError, match=r'config\.data\.background is'):
            inputs.decoding(data_section(3, background=background))


def test_survey_measures_the_same_range(tmp_path) -> None:
    spec = write(tmp_path / 'deep', [TWELVE] * 3)
    data = data_section(3)
    inputs.open_source(spec, data)
    seen = survey(sources.open_source(spec))
    assert str(seen.value_range(3)) == data.range
    full, narrow = ValueRange((0.0,), (4095.0,)), value_range.DTYPE
    assert (seen.histogram(3, full) > 0).sum(1).min() >= W
    assert (seen.histogram(3, narrow) > 0).sum(1).max() <= 17
    normalized = seen.normalization(3)
    np.testing.assert_allclose(normalized['mean'], RGB.mean((0, 1)) / 255, atol=0.01)


def test_normalization_of_a_sample(tmp_path) -> None:
    images = [np.roll(RGB, i, 0) // (1 + i % 3) for i in range(12)]
    source = inputs.open_source(write(tmp_path / 'plain', images), data_section(3, backend='host'))
    measured = sample_statistics.measure_normalization(source)
    pixels = np.stack(images).reshape(-1, 3) / 255
    np.testing.assert_allclose(measured['mean'], pixels.mean(0), atol=1e-4)
    np.testing.assert_allclose(measured['std'], pixels.std(0), atol=1e-4)


def test_guide_names_every_extension() -> None:
    guide = pathlib.Path(__file__).parent.parent / 'docs' / 'guides' / 'data.md'
    table = guide.read_text().partition('## Image formats')[2].partition('\n\nImages may')[0]
    cells = [line.split('|')[2] for line in table.splitlines() if line.startswith('| ')]
    named = re.findall(r'`(\.\w+)`', ' '.join(cells))
    assert sorted(named) == sorted([*image_files.EXTENSIONS, *image_files.EXTRAS])
