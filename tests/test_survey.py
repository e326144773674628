"""What is seen of images, and the recipe that it leads to."""

import dataclasses
import io
import pathlib

import numpy as np
import pytest
import tifffile
from configurations import load
from ml_collections import ConfigDict
from PIL import Image

from simsiam_jax import errors
from simsiam_jax.data import files, raster_files, sources
from simsiam_jax.data.raster import Raster
from simsiam_jax.data.survey import DatasetSurvey, image_stats, survey
from simsiam_jax.tools.doctor import config_writer, image_checks, recommend
from simsiam_jax.tools.doctor.context import Context

ROOT = pathlib.Path(__file__).parent.parent


def encoded(array: np.ndarray, form: str, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    if form == 'npy':
        np.save(file, array)
    elif form == 'tiff':
        tifffile.imwrite(file, array, photometric='minisblack')
    else:
        image = Image.fromarray(array)
        (image.convert(mode) if mode else image).save(file, form)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Returns noise with about the mean and standard deviation of ImageNet."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.45, 0.22, (height, width, channels))
    return (255 * np.clip(values, 0, 1)).astype(np.uint8)


@pytest.mark.parametrize(
    ('data', 'channels', 'bits'),
    [
        (encoded(noise(9, 7), 'jpeg'), 3, 8),
        (encoded(noise(9, 7), 'jpeg', 'L'), 1, 8),
        (encoded(noise(9, 7), 'jpeg', 'CMYK'), 3, 8),
        (encoded(noise(9, 7), 'png', 'RGBA'), 3, 8),
        (encoded(noise(9, 7), 'png', 'LA'), 1, 8),
        (encoded(noise(9, 7), 'png', '1'), 1, 8),
        (encoded(noise(9, 7), 'gif', 'P'), 3, 8),
        (encoded(noise(9, 7)[..., 0].astype(np.uint16), 'png'), 1, 16),
        (encoded(noise(9, 7, 5), 'npy'), 5, 8),
        (encoded(noise(9, 7, 1)[..., 0] / np.float32(255), 'npy'), 1, 32),
        (encoded(noise(9, 7, 6).astype(np.uint16), 'tiff'), 6, 16),
    ],
)
def test_rasters_have_stored_channels_and_bits(data: bytes, channels: int, bits: int) -> None:
    raster = raster_files.read(data)
    assert (raster.values.shape, raster.bits) == ((9, 7, channels), bits)


def test_image_stats_match_numpy() -> None:
    image = noise(40, 60)
    stats = image_stats(Raster(image))
    assert (stats.height, stats.width, stats.channels, stats.gray) == (40, 60, 3, False)
    np.testing.assert_array_equal(stats.pixels, image[:, ::2].reshape(-1, 3))
    normalization = DatasetSurvey(1, (stats,), ('image',), {}, 0.0).normalization(3)
    np.testing.assert_allclose(normalization['mean'], image[:, ::2].mean((0, 1)) / 255, atol=1e-4)
    np.testing.assert_allclose(normalization['std'], image[:, ::2].std((0, 1)) / 255, atol=1e-4)
    assert image_stats(Raster(np.repeat(image[..., :1], 3, -1))).gray
    assert not image_stats(Raster(np.full((9, 9, 1), 7, np.uint8))).thumb.any()


def of_arrays(images: list[np.ndarray]) -> DatasetSurvey:
    stats = tuple(image_stats(Raster(image)) for image in images)
    names = tuple(f'image {i}' for i in range(len(images)))
    return DatasetSurvey(len(images), stats, names, {}, 0.001)


def test_near_duplicates_are_copies_saved_again() -> None:
    original = np.asarray(Image.fromarray(noise(6, 6)).resize((120, 90)))
    again = np.asarray(Image.open(io.BytesIO(encoded(original, 'jpeg'))))
    half = np.asarray(Image.fromarray(original).resize((60, 45)))
    bright = np.clip(original * 1.1, 0, 255).astype(np.uint8)
    other = np.asarray(Image.fromarray(noise(6, 6, seed=1)).resize((120, 90)))
    blank = [np.full((9, 9, 3), shade, np.uint8) for shade in (0, 80)]
    surveyed = of_arrays([original, again, half, bright, other, *blank])
    count, pairs = surveyed.near_duplicates()
    assert count == 4
    assert pairs[:3] == [(f'image {i}', 'image 0') for i in (1, 2, 3)]
    assert pairs[3] == ('image 6', 'image 5')
    # 360 digits of ten kinds, no two of them identical.
    assert survey(sources.open_source('digits/test')).near_duplicates()[0] == 0


def test_survey_stops_in_time_and_names_bad_images(tmp_path: pathlib.Path) -> None:
    for i in range(30):
        Image.fromarray(noise(20, 30, seed=i)).save(tmp_path / f'{i:02}.png')
    (tmp_path / '03.png').write_bytes(b'\x89PNG\r\n\x1a\n nothing more')
    (tmp_path / '04.png').write_bytes(b'')
    source = files.open_folder(str(tmp_path))
    whole = survey(source)
    assert whole.whole
    assert (whole.count, whole.seen, whole.bad_fraction) == (30, 30, 2 / 30)
    assert {pathlib.Path(name).name for name in whole.bad} == {'03.png', '04.png'}
    np.testing.assert_array_equal(whole.sides(), [[20, 30]] * 28)
    assert survey(source, limit=7).seen == 7
    large = files.FileSource(source.paths * 1000, source.labels * 1000, ())
    assert 0 < survey(large, seconds=0.01).seen < 30_000


def test_shrinkage_is_crop_side_over_view_side() -> None:
    found = of_arrays([noise(100, 400)])  # as a square of 200
    scale = found.shrinkage(50, (0.25, 1.0))
    assert (scale[0], scale[-1]) == (2, 4)


def many(count: int, height: int, width: int, channels: int = 3) -> DatasetSurvey:
    """Returns a survey of `count` images of a size, of which eight were sampled."""
    small = of_arrays([noise(height, width, channels, seed) for seed in range(8)])
    return dataclasses.replace(small, count=count)


def advised(
    seen: DatasetSurvey, config: ConfigDict, *, accelerator: bool = True, devices: int = 8
) -> tuple[ConfigDict, dict]:
    """Returns the configuration as recommended and the values of the changed keys."""
    advice = recommend.recommend(seen, seen.count, config, devices=devices, accelerator=accelerator)
    assert all(a.reason for a in advice)
    return recommend.apply(config, advice), {a.key: a.value for a in advice}


@pytest.mark.parametrize(
    ('path', 'seen', 'accelerator'),
    [
        ('imagenet', many(1_281_167, 375, 500), True),
        ('cifar10', many(50_000, 32, 32), True),
        ('quickstart', many(1437, 8, 8, 1), False),
    ],
)
def test_recommend_changes_nothing_for_images_of_the_configuration(
    path: str, seen: DatasetSurvey, accelerator: bool
) -> None:
    assert advised(seen, load(path), accelerator=accelerator)[1] == {}


def test_recommend_gives_cifar_settings_to_cifar_images() -> None:
    config, _ = advised(many(50_000, 32, 32), load('folder'))
    cifar = load('cifar10')
    assert config.model == cifar.model
    assert config.method == cifar.method
    assert (config.epochs, config.augment.size, config.augment.blur) == (800, 32, 0)
    for key in ('learning_rate', 'weight_decay', 'warmup_epochs', 'predictor_schedule'):
        assert config.optim[key] == cifar.optim[key]


@pytest.mark.parametrize(
    ('count', 'shape', 'expected'),
    [
        # Photographs: few, and more than in ImageNet.
        (5_000, (300, 400, 3), {'model.name': 'resnet18', 'epochs': 800}),
        (2_000_000, (300, 400, 3), {}),
        # Small and medium images, other numbers of channels.
        (5_000, (64, 64, 3), {'augment.size': 64, 'model.stem': 'cifar', 'eval.resize': 64}),
        (5_000, (150, 170, 3), {'augment.size': 128, 'eval.resize': 146}),
        (5_000, (300, 300, 1), {'data.channels': 1, 'augment.hue': 0.0}),
        (5_000, (300, 300, 5), {'data.channels': 5, 'augment.gray': 0.0}),
        # Few images limit the batch and make epochs short.
        (700, (300, 300, 3), {'batch_size': 64, 'checkpoint.every_epochs': 10.0}),
        (40, (300, 300, 3), {'batch_size': 16}),
        (60_000, (10, 10, 3), {'augment.crop_scale': (0.5, 1.0), 'model.stages': (1, 1, 1)}),
        (60_000, (8, 8, 3), {'augment.crop_scale': (0.6, 1.0)}),
    ],
)
def test_recommend_follows_images_and_is_idempotent(
    count: int, shape: tuple, expected: dict
) -> None:
    _, advice = advised(many(count, *shape), load('folder'))
    assert {key: advice[key] for key in expected} == expected
    if not expected:
        assert 'model.name' not in advice
        assert 'epochs' not in advice
    config, _ = advised(many(count, *shape), load('folder'))
    assert advised(many(count, *shape), config)[1] == {}


def test_recommend_shrinks_network_on_cpu_and_keeps_other_methods() -> None:
    seen = many(5_000, 300, 400)
    config, _ = advised(seen, load('folder'), accelerator=False)
    assert (config.augment.size, config.model.stages, config.model.dtype) == (
        32,
        (1, 1, 1),
        'float32',
    )
    assert config.augment.crop_scale == (0.5, 1.0)
    byol = load('folder')
    byol.method.name = 'byol'
    assert not {k for k in advised(seen, byol)[1] if k.startswith(('model', 'method', 'optim'))}


def test_recommend_replaces_small_network_for_many_images() -> None:
    config = load('folder')
    config.model.name = 'resnet18'
    advice = recommend.recommend(
        many(2_000_000, 300, 400), 2_000_000, config, devices=8, accelerator=True
    )
    (network,) = (a for a in advice if a.key == 'model.name')
    assert network.value == 'resnet50'
    assert 'Li et al., 2022' in network.reason


def test_recommend_batch_divides_over_devices() -> None:
    for devices in (1, 3, 6, 8):
        for count in (50, 1000, 100_000):
            config, _ = advised(many(count, 32, 32), load('folder'), devices=devices)
            assert config.batch_size % devices == 0
            assert config.batch_size <= count


def test_check_images_warns_of_dark_16_bit_images() -> None:
    dark = [image_stats(Raster(noise(9, 9, 1).astype(np.uint16) * 16, 16)) for _ in range(3)]
    seen = DatasetSurvey(3, tuple(dark), ('a', 'b', 'c'), {}, 0.001)

    def warnings(chosen: str) -> list[str]:
        config = load('folder')
        config.data.range = chosen
        found = map(str, image_checks.check_images(Context(config, survey=seen)))
        return [line for line in found if line.startswith('warning') and 'of 256 levels' in line]

    assert not warnings('auto')
    assert 'fill 14 of 256 levels' in warnings('dtype')[0]
    assert '% at 255' in warnings('0,1000')[0]


def test_config_writer_writes_configuration_and_reasons(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'mine.py'
    config = load('cifar10')
    with config.unlocked():
        config.method = ConfigDict({'name': 'moco_v2', 'queue_size': 64})
        config.second_view.blur = 0.1
    advice = [recommend.Advice('augment.mean', (0.5,), 'because of this')]
    config_writer.write(str(path), config, advice, 'cifar10.py')
    assert load(path) == recommend.apply(config, advice)
    assert '# because of this\n    config.augment.mean = (0.5,)' in path.read_text()
    with pytest.raises(errors.UserError, match='exists; pass another'):
        config_writer.write(str(path), config, advice, 'cifar10.py')
    with pytest.raises(errors.UserError, match='cannot be written'):
        config_writer.write(str(tmp_path / 'no' / 'x.py'), config, advice, 'cifar10.py')
