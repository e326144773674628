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
from simsiam_jax.data import files, sources
from simsiam_jax.data.survey import DatasetSurvey, describe, look_at, survey
from simsiam_jax.tools.doctor import config_writer, image_checks, recommend

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
    """With ImageNet's mean and spread, about."""
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
def test_images_are_described_as_they_are_stored(data: bytes, channels: int, bits: int) -> None:
    assert describe(data) == (channels, bits)


def test_looks_are_numpys() -> None:
    image = noise(40, 60)
    look = look_at(image, 8)
    assert (look.height, look.width, look.channels, look.gray) == (40, 60, 3, False)
    np.testing.assert_allclose(look.mean, image.mean((0, 1)) / 255, rtol=1e-5)
    np.testing.assert_allclose(look.square, np.square(image / 255).mean((0, 1)), rtol=1e-5)
    assert look.brightest == image.max()
    assert look_at(np.repeat(image[..., :1], 3, -1), 8).gray
    assert not look_at(np.full((9, 9, 1), 7, np.uint8), 8).thumb.any()


def of_arrays(images: list[np.ndarray]) -> DatasetSurvey:
    looks = tuple(look_at(image, 8) for image in images)
    return DatasetSurvey(
        len(looks), looks, tuple(f'image {i}' for i in range(len(looks))), {}, 0.001
    )


def test_copies_are_those_saved_again_and_not_others_of_their_kind() -> None:
    original = np.asarray(Image.fromarray(noise(6, 6)).resize((120, 90)))
    again = np.asarray(Image.open(io.BytesIO(encoded(original, 'jpeg'))))
    half = np.asarray(Image.fromarray(original).resize((60, 45)))
    bright = np.clip(original * 1.1, 0, 255).astype(np.uint8)
    other = np.asarray(Image.fromarray(noise(6, 6, seed=1)).resize((120, 90)))
    blank = [np.full((9, 9, 3), shade, np.uint8) for shade in (0, 80)]
    found = of_arrays([original, again, half, bright, other, *blank])
    count, pairs = found.copies()
    assert count == 4
    assert pairs[:3] == [(f'image {i}', 'image 0') for i in (1, 2, 3)]
    assert pairs[3] == ('image 6', 'image 5')
    # 360 digits of ten kinds, no two of them the same.
    assert survey(sources.open_source('digits/test')).copies()[0] == 0


def test_a_survey_ends_in_time_and_names_what_is_bad(tmp_path: pathlib.Path) -> None:
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


def test_shrinkage_is_the_crops_side_over_the_views() -> None:
    found = of_arrays([noise(100, 400)])  # as a square of 200
    scale = found.shrinkage(50, (0.25, 1.0))
    assert (scale[0], scale[-1]) == (2, 4)


def many(count: int, height: int, width: int, channels: int = 3) -> DatasetSurvey:
    """A survey of so many images of a size, eight of which were looked at."""
    small = of_arrays([noise(height, width, channels, seed) for seed in range(8)])
    return dataclasses.replace(small, count=count)


def advised(
    found: DatasetSurvey, config: ConfigDict, *, accelerator: bool = True, devices: int = 8
):
    advice = recommend.recommend(
        found, found.count, config, devices=devices, accelerator=accelerator
    )
    assert all(a.reason for a in advice)
    return recommend.apply(config, advice), {a.key: a.value for a in advice}


@pytest.mark.parametrize(
    ('path', 'found', 'accelerator'),
    [
        ('imagenet', many(1_281_167, 375, 500), True),
        ('cifar10', many(50_000, 32, 32), True),
        ('quickstart', many(1437, 8, 8, 1), False),
    ],
)
def test_the_papers_settings_fit_the_papers_images(
    path: str, found: DatasetSurvey, accelerator: bool
) -> None:
    assert advised(found, load(path), accelerator=accelerator)[1] == {}


def test_a_folder_of_cifars_images_gets_cifars_settings() -> None:
    config, _ = advised(many(50_000, 32, 32), load('folder'))
    papers = load('cifar10')
    assert config.model == papers.model
    assert config.method == papers.method
    assert (config.epochs, config.augment.size, config.augment.blur) == (800, 32, 0)
    for key in ('learning_rate', 'weight_decay', 'warmup_epochs', 'predictor'):
        assert config.optim[key] == papers.optim[key]


@pytest.mark.parametrize(
    ('count', 'shape', 'expected'),
    [
        # Photographs: few, and more than ImageNet has.
        (5_000, (300, 400, 3), {'model.name': 'resnet18', 'epochs': 800}),
        (2_000_000, (300, 400, 3), {}),
        # Small, middling, of other channels.
        (5_000, (64, 64, 3), {'augment.size': 64, 'model.stem': 'cifar', 'eval.resize': 64}),
        (5_000, (150, 170, 3), {'augment.size': 128, 'eval.resize': 146}),
        (5_000, (300, 300, 1), {'data.channels': 1, 'augment.hue': 0.0}),
        (5_000, (300, 300, 5), {'data.channels': 5, 'augment.gray': 0.0}),
        # So few that a batch is not a power of two times eight an epoch.
        (700, (300, 300, 3), {'batch_size': 64, 'checkpoint.every_epochs': 10.0}),
        (40, (300, 300, 3), {'batch_size': 16}),
        (60_000, (10, 10, 3), {'augment.crop_scale': (0.4, 1.0), 'model.stages': (1, 1, 1)}),
    ],
)
def test_the_recipe_follows_the_images(count: int, shape: tuple, expected: dict) -> None:
    _, advice = advised(many(count, *shape), load('folder'))
    assert {key: advice[key] for key in expected} == expected
    if not expected:
        assert 'model.name' not in advice
        assert 'epochs' not in advice
    # Once followed, nothing is left to say.
    config, _ = advised(many(count, *shape), load('folder'))
    assert advised(many(count, *shape), config)[1] == {}


def test_a_cpu_gets_what_a_cpu_can_do_and_other_methods_keep_their_own() -> None:
    found = many(5_000, 300, 400)
    config, _ = advised(found, load('folder'), accelerator=False)
    assert (config.augment.size, config.model.stages, config.model.dtype) == (
        32,
        (1, 1, 1),
        'float32',
    )
    byol = load('folder')
    byol.method.name = 'byol'
    assert not {k for k in advised(found, byol)[1] if k.startswith(('model', 'method', 'optim'))}


def test_a_small_network_on_many_images_is_warned_of() -> None:
    config = load('folder')
    config.model.name = 'resnet18'
    advice = recommend.recommend(
        many(2_000_000, 300, 400), 2_000_000, config, devices=8, accelerator=True
    )
    (found,) = (a for a in advice if a.key == 'model.name')
    assert found.value == 'resnet50'
    assert 'Li et al., 2022' in found.reason


def test_batches_divide_over_the_devices() -> None:
    for devices in (1, 3, 6, 8):
        for count in (50, 1000, 100_000):
            config, _ = advised(many(count, 32, 32), load('folder'), devices=devices)
            assert config.batch_size % devices == 0
            assert config.batch_size <= count


def test_twelve_bits_in_sixteen_are_told() -> None:
    dark = [dataclasses.replace(look_at(noise(9, 9, 1) // 16, 16)) for _ in range(3)]
    found = DatasetSurvey(3, tuple(dark), ('a', 'b', 'c'), {}, 0.001)
    lines = [str(f) for f in image_checks.check_images(found, 0, [], load('folder'))]
    assert any('reach only' in line and line.startswith('warns') for line in lines)


def test_what_is_written_is_the_configuration_and_its_reasons(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'mine.py'
    config = load('cifar10')
    with config.unlocked():
        config.method = ConfigDict({'name': 'moco_v2', 'queue_size': 64})
        config.second_view.blur = 0.1
    advice = [recommend.Advice('augment.mean', (0.5,), 'because of this')]
    config_writer.write(str(path), config, advice, 'cifar10.py')
    found = load(path)
    assert found == recommend.apply(config, advice)
    assert '# because of this\n    config.augment.mean = (0.5,)' in path.read_text()
    with pytest.raises(errors.UserError, match='is there already'):
        config_writer.write(str(path), config, advice, 'cifar10.py')
    with pytest.raises(errors.UserError, match='cannot be written'):
        config_writer.write(str(tmp_path / 'no' / 'x.py'), config, advice, 'cifar10.py')
