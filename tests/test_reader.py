"""Tests of data/decode.py, data/reader.py and data/device_cache.load."""

import errno
import io
import itertools
import os
import pathlib
import time

import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile

from simsiam_jax import errors
from simsiam_jax.data import device_cache, files, host
from simsiam_jax.data.decode import decode
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler

RECIPES = (Recipe(size=8, blur=0.0),)


def gradient(height: int = 64, width: int = 48) -> np.ndarray:
    """Returns an RGB image without detail, which JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(x, 90)], -1).astype(np.uint8)


IMAGE = gradient()
LUMINANCE = np.asarray(PIL.Image.fromarray(IMAGE).convert('L'))[..., None]
FIVE = IMAGE[..., [0, 1, 2, 1, 0]]


def encode(image: np.ndarray, kind: str = 'png', mode: str = '', **options) -> bytes:
    file = io.BytesIO()
    picture = PIL.Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def assert_decodes(encoded: bytes, expected: np.ndarray, atol: int = 0) -> None:
    image = decode(encoded, expected.shape[-1])
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous  # required by the compiled geometry
    np.testing.assert_allclose(image.astype(int), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    'encoded',
    [
        encode(IMAGE),
        encode(IMAGE, mode='RGBA'),
        encode(IMAGE, 'bmp'),
        encode(IMAGE, 'webp', lossless=True),
        encode(IMAGE, 'tiff'),
        encode(IMAGE, 'tiff', compression='tiff_lzw'),
        tiff(IMAGE, photometric='rgb', byteorder='>'),
        npy(IMAGE),
        npy(np.asfortranarray(IMAGE)),
        npy(IMAGE.astype(np.uint16) * 257),
        npy(IMAGE.astype('>u2') * 257),
        npy(IMAGE / np.float32(255)),
        npy(np.asfortranarray(IMAGE / 255)),
    ],
    ids=[
        'png', 'alpha', 'bmp', 'webp', 'tiff', 'lzw tiff', 'big-endian tiff', 'npy', 'fortran npy',
        'npy of 16 bits', 'big-endian npy', 'npy of floats', 'fortran npy of floats',
    ],
)  # fmt: skip
def test_decode_lossless_files(encoded) -> None:
    assert_decodes(encoded, IMAGE)


@pytest.mark.parametrize(
    'encoded',
    [encode(LUMINANCE[..., 0]), encode(LUMINANCE[..., 0], 'gif'), encode(IMAGE, mode='LA')],
    ids=['png', 'gif', 'alpha'],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_decode_gray_files(encoded, channels) -> None:
    assert_decodes(encoded, np.repeat(LUMINANCE, channels, -1))


@pytest.mark.parametrize(
    ('kind', 'channels'),
    [*itertools.product(['png', 'tiff', 'big-endian tiff'], [1, 3]), ('png', 4)],
)
def test_decode_16_bit_gray(kind, channels) -> None:
    deep = LUMINANCE[..., 0].astype(np.uint16) * 257
    encoded = encode(deep) if kind == 'png' else tiff(deep, byteorder='>' if 'big' in kind else '<')
    expected = np.repeat(LUMINANCE, channels, -1)
    if channels == 4:
        expected[..., 3] = 255
    assert_decodes(encoded, expected)


def test_decode_converts_color_to_gray_and_alpha() -> None:
    assert_decodes(encode(IMAGE), LUMINANCE)
    assert_decodes(encode(IMAGE, 'jpeg'), LUMINANCE, atol=8)
    opaque = np.concatenate([IMAGE, np.full_like(LUMINANCE, 255)], -1)
    assert_decodes(encode(IMAGE), opaque)
    assert_decodes(encode(opaque), opaque)


def test_decode_lossy_files() -> None:
    for encoded in (
        encode(IMAGE, 'jpeg'),
        encode(IMAGE, 'jpeg', progressive=True),
        encode(IMAGE, 'jpeg', 'CMYK'),
        encode(IMAGE, 'webp'),
    ):
        assert_decodes(encoded, IMAGE, atol=16)
        assert np.abs(decode(encoded, 3).astype(int) - IMAGE).mean() < 3
    for channels in (1, 3):
        assert_decodes(encode(IMAGE, 'jpeg', 'L'), np.repeat(LUMINANCE, channels, -1), atol=8)


def test_decode_accepts_stray_bytes_but_not_truncation() -> None:
    # Some of ImageNet's files have stray bytes; libjpeg warns, and PyTorch's loaders continue.
    jpeg = encode(IMAGE, 'jpeg', quality=95)
    stray = jpeg[:-2] + b'\0\x11\x22' * 5 + jpeg[-2:]
    np.testing.assert_array_equal(decode(stray, 3), decode(jpeg, 3))
    with pytest.raises(ValueError, match=r'(?i)truncated'):
        decode(jpeg[: len(jpeg) // 2], 3)


def test_decode_palettes() -> None:
    palette = PIL.Image.fromarray(IMAGE).quantize(64)
    expected = np.asarray(palette.convert('RGB'))
    file = io.BytesIO()
    palette.save(file, 'png')
    assert_decodes(file.getvalue(), expected)


def test_decode_first_frame_of_gif() -> None:
    frames = [PIL.Image.fromarray(x[..., 0]) for x in (LUMINANCE, 255 - LUMINANCE)]
    file = io.BytesIO()
    frames[0].save(file, 'gif', save_all=True, append_images=frames[1:])
    assert_decodes(file.getvalue(), np.repeat(LUMINANCE, 3, -1))


@pytest.mark.parametrize(
    'encoded',
    [
        tiff(FIVE, photometric='minisblack', planarconfig='contig'),
        tiff(FIVE.astype(np.uint16) * 257, photometric='minisblack', planarconfig='contig'),
        tiff(FIVE, photometric='minisblack', planarconfig='contig', bigtiff=True),
        npy(FIVE),
        npy(FIVE.astype(np.uint16) * 257),
        npy(FIVE / 255),
        npy(FIVE / np.float32(255)),
    ],
    ids=['tiff', 'tiff of 16 bits', 'bigtiff', 'npy', '16 bits', 'float64', 'float32'],
)
def test_decode_5_channels(encoded) -> None:
    assert_decodes(encoded, FIVE)
    with pytest.raises(ValueError, match=r'expected \[H, W, 4\]'):
        decode(encoded, 4)


@pytest.mark.parametrize(
    ('encoded', 'channels', 'message'),
    [
        (encode(IMAGE), 5, r'shape \(64, 48, 3\); expected \[H, W, 5\]'),
        (encode(IMAGE, 'jpeg'), 2, r'shape \(64, 48, 3\); expected \[H, W, 2\]'),
        (npy(FIVE), 3, r'shape \(64, 48, 5\); expected \[H, W, 3\]'),
        (tiff(IMAGE, photometric='rgb'), 5, r'shape \(64, 48, 3\); expected \[H, W, 5\]'),
        (npy(FIVE[None]), 5, r'shape \(1, 64, 48, 5\); expected \[H, W\] or \[H, W, C\]'),
        (npy(FIVE[:0]), 5, r'shape \(0, 48, 5\); expected'),
        (npy(FIVE.astype(complex)), 5, r'dtype complex128; expected integers or floats'),
        (npy(np.array([None] * 5)), 5, r'allow_pickle'),
        (b'', 3, r'unknown image format'),
        (b'<html>not found</html>', 3, r'unknown image format'),
        (encode(IMAGE, 'jpeg')[:-200], 3, r'image file is truncated'),
        (encode(IMAGE, 'jpeg')[:100], 3, r'.'),
        (encode(IMAGE)[:-40], 3, r'truncated|Truncated'),
        (npy(IMAGE)[:-40], 3, r'.'),
    ],
)
def test_decode_rejects_damage_and_other_channels(encoded, channels, message) -> None:
    with pytest.raises(ValueError, match=message):
        decode(encoded, channels)


def test_decode_rejects_gigapixels() -> None:
    encoded = bytearray(encode(IMAGE, 'jpeg'))
    size = encoded.index(b'\xff\xc0') + 5
    encoded[size : size + 4] = b'\xff\xdc\xff\xdc'
    with pytest.raises(ValueError, match=r'65500x65500 pixels; expected at most'):
        decode(bytes(encoded), 3)


def fill(root: pathlib.Path, bad: dict[int, bytes | None], n: int = 12) -> Reader:
    """Returns a reader of n images; the bad images contain these bytes, or are missing if None."""
    paths = [str(root / f'{i:02}.jpg') for i in range(n)]
    for i, path in enumerate(paths):
        content = bad.get(i, encode(gradient(20 + i, 30)))  # PNG despite the extension
        if content is not None:
            pathlib.Path(path).write_bytes(content)
    return Reader(files.FileSource(paths, list(range(n)), tuple(map(str, range(n)))), 3, 0.5)


BAD = {
    1: encode(IMAGE, 'jpeg')[:-200],
    2: b'',
    5: b'<html>not found</html>',
    8: None,
    11: encode(IMAGE)[:60],
}


def train(reader: Reader, start: int, stop: int, local: slice = slice(0, 4)) -> list[np.ndarray]:
    batches = host.train_batches(
        reader,
        IndexSampler(0, len(reader), 4),
        RECIPES,
        on_device='color',
        canvas=32,
        start=start,
        stop=stop,
        local=local,
    )
    return [batch['crops'][0] for batch in batches]


def test_reader_replaces_bad_image_by_next_good_one(tmp_path) -> None:
    reader = fill(tmp_path, BAD)
    for index, neighbor in ((1, 3), (2, 3), (5, 6), (8, 9), (11, 0), (4, 4)):
        image, label = reader.example(index)
        np.testing.assert_array_equal(image, gradient(20 + neighbor, 30))
        assert label == reader.source.labels[neighbor]
    assert sorted(reader.bad) == [str(tmp_path / f'{i:02}.jpg') for i in BAD]
    reasons = ' '.join(reader.bad.values())
    assert all(part in reasons for part in ('truncated', 'unknown image format', 'No such file'))
    assert '\n' not in reasons


def test_train_batches_with_bad_images_repeat_and_resume(tmp_path) -> None:
    run = train(fill(tmp_path, BAD), 0, 6)
    np.testing.assert_array_equal(train(fill(tmp_path, BAD), 2, 6), run[2:])
    parts = [train(fill(tmp_path, BAD), 0, 6, local) for local in (slice(0, 1), slice(1, 4))]
    np.testing.assert_array_equal(np.concatenate(parts, 1), run)


def test_eval_batches_blank_and_unlabel_bad_images(tmp_path) -> None:
    reader = fill(tmp_path, BAD)
    batches = host.eval_batches(reader, batch_size=4, size=16, resize=16, local=slice(0, 4))
    images, labels, indices = map(np.concatenate, zip(*batches, strict=True))
    np.testing.assert_array_equal(labels, indices)
    np.testing.assert_array_equal(labels, [-1 if i in BAD else i for i in range(12)])
    np.testing.assert_array_equal(images.any((1, 2, 3)), labels >= 0)


def evaluate(reader: Reader) -> list:
    return list(host.eval_batches(reader, batch_size=4, size=8, resize=8, local=slice(0, 4)))


@pytest.mark.parametrize('use', [evaluate, lambda reader: train(reader, 0, 3)])
def test_reader_stops_at_too_many_bad_images(tmp_path, capfd, use) -> None:
    reader = fill(tmp_path, dict.fromkeys(range(7), b'<html>'))
    message = r'^7 of 12 images cannot be read, .*max_bad_fraction=0\.5 .*\d\d\.jpg: unknown image'
    with pytest.raises(errors.UserError, match=message) as caught:
        use(reader)
    assert '\n' not in str(caught.value)
    assert 'Traceback' not in capfd.readouterr().err  # TensorFlow would print an error that it sees


def test_reader_without_readable_images(tmp_path) -> None:
    reader = fill(tmp_path, dict.fromkeys(range(3), b''), 3)
    reader = Reader(reader.source, 3, 1.0)
    with pytest.raises(errors.UserError, match='none of the images can be read'):
        reader.example(1)


# As in a run, in which warnings are not errors.
@pytest.mark.filterwarnings('ignore')
def test_decode_survives_300_kinds_of_damage() -> None:
    small = gradient(24, 20)
    originals = [
        (encode(small, 'jpeg'), 3),
        (encode(small, 'jpeg', progressive=True), 1),
        (encode(small), 3),
        (encode(small, 'bmp'), 3),
        (encode(small, 'gif'), 3),
        (encode(small, 'webp'), 3),
        (encode(small, 'tiff', compression='tiff_lzw'), 3),
        (tiff(FIVE[:24, :20], photometric='minisblack', planarconfig='contig'), 5),
        (tiff(small.astype(np.uint16), photometric='rgb', compression='zstd', tile=(16, 16)), 3),
        (tiff(small, photometric='rgb', compression='jpeg'), 3),
        (encode(small[..., 0].astype(np.uint16) * 257), 1),
        (imagecodecs.png_encode(small.astype(np.uint16) * 257), 3),
        (encode(small, 'avif'), 3),
        (encode(small, 'jpeg2000'), 3),
        (encode(small, 'tga'), 3),
        (encode(small, 'ico'), 3),
        (encode(small, 'png', 'RGBA'), 4),
        (npy(small), 3),
        (npy(small / np.float32(255)), 3),
    ]
    decoded = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        encoded, channels = originals[seed % len(originals)]
        other, _ = originals[rng.integers(len(originals))]
        damaged = bytearray(encoded)
        kind = seed // len(originals) % 3
        if kind == 0:
            # Half of the damage is in the header.
            end = len(damaged) if rng.random() < 0.5 else min(128, len(damaged))
            for at in rng.integers(0, end, rng.integers(1, 9)):
                damaged[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            del damaged[rng.integers(len(damaged)) :]
        else:
            length = rng.integers(4, 64)
            damaged[:length] = other[:length]
        began = time.perf_counter()
        try:
            image = decode(bytes(damaged), channels)
        except ValueError:
            pass
        else:
            decoded += 1
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == channels
            assert image.size
        assert time.perf_counter() - began < 1, seed
    assert 30 < decoded < 270


def equal_images(n: int = 6) -> list[bytes]:
    return [encode(np.roll(gradient(20, 30), i, 0)) for i in range(n)]


def load(root: pathlib.Path, contents: list[bytes], limit: int = 10**6):
    reader = fill(root, dict(enumerate(contents)), len(contents))
    return device_cache.load(reader, limit)


def test_cache_loads_small_source_of_equal_sizes(tmp_path) -> None:
    source = load(tmp_path, equal_images())
    for i, image in enumerate(source.images):
        np.testing.assert_array_equal(image, np.roll(gradient(20, 30), i, 0))
    np.testing.assert_array_equal(source.labels, np.arange(6))
    assert source.classes == tuple('012345')
    assert load(tmp_path, equal_images(), 6 * 20 * 30 * 3) is not None


def test_cache_declines_large_uneven_or_bad_source(tmp_path) -> None:
    images = equal_images()
    assert load(tmp_path, images, 6 * 20 * 30 * 3 - 1) is None
    assert load(tmp_path, [*images, encode(gradient(21, 30))]) is None
    assert load(tmp_path, [*images, b'']) is None
    assert load(tmp_path, [b'', *images]) is None


class Flaky:
    """Source of three images; `fails` raises what reading an image raises now."""

    classes, identity = (), ''

    def __init__(self, fails):
        self.fails, self.reads = fails, 0

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> tuple[bytes, int]:
        self.reads += 1
        self.fails(index, self.reads)
        return encode(gradient(20, 30)), index

    def name(self, index: int) -> str:
        return f'{index}.png'


@pytest.mark.parametrize('number', [errno.ESTALE, errno.ENOENT, errno.EIO])
def test_reader_waits_while_no_image_can_be_read(number: int, capsys) -> None:
    away: list[float] = []  # when the storage returns

    def fails(index: int, reads: int) -> None:
        if reads == 3:
            away.append(time.monotonic() + 0.5)
        if away and time.monotonic() < away[0]:
            raise OSError(number, os.strerror(number))

    reader = Reader(Flaky(fails), 3, 0.0, 60.0)
    assert [reader.read(i % 3)[1] for i in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert reader.bad == {}
    first, second = capsys.readouterr().err.splitlines()
    assert f'waiting up to 60 s for the storage of the images: {os.strerror(number)}' in first
    assert 'the storage of the images can be used again after 0.' in second


def test_reader_gives_up_after_retry_seconds() -> None:
    def fails(index: int, reads: int) -> None:
        if reads > 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    reader = Reader(Flaky(fails), 3, 0.5, 0.3)
    reader.read(0)
    with pytest.raises(errors.TemporaryError, match=r'cannot be used for 0 s now: Stale file'):
        reader.read(1)
    assert reader.bad == {}


def test_reader_forgives_an_image_that_reads_later() -> None:
    broken = True

    def fails(index: int, reads: int) -> None:
        if index == 1 and broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    reader = Reader(Flaky(fails), 3, 0.5)
    assert [reader.read(i)[0] is None for i in range(3)] == [False, True, False]
    assert os.strerror(errno.EIO) in reader.bad['1.png']
    broken = False
    assert reader.read(1)[1] == 1
    assert reader.bad == {}


def test_reader_names_wrong_paths_at_once(tmp_path) -> None:
    paths = [str(tmp_path / name) for name in 'abc']
    reader = Reader(files.FileSource(paths, [0] * 3, ()), 3, 1.0, 60.0)
    with pytest.raises(errors.UserError, match='none of the images can be read'):
        reader.example(0)
