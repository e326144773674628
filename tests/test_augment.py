"""Tests of data/recipe.py, ops.py, jax_augment.py, tf_augment.py, geometry.py and host_stage.py.

The expected values are torchvision's, written by figures/augmentation.py.
"""

import functools
import io
import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from simsiam_jax import errors, lazy_tf
from simsiam_jax.data import geometry, host, jax_augment, ops, recipe, tf_augment
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler

# The parameters of the figures.
SIZE = 24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACTORS = (0.6, 1.4)
SHIFTS = (-0.5, -0.1, 0.04, 0.1, 0.3)
SIGMAS = (0.1, 0.7, 2.0)
BOXES = ((20, 30, 24, 24), (9, 4, 50, 66), (31, 47, 13, 11), (2, 70, 57, 9), (0, 0, 60, 80))
RESIZES = (24, 28, 31)
ANGLES = (15.0, -40.0)
CHAINS = (
    ((9, 4, 40, 52), (1.3, 0.7, 1.35, -0.08), (0, 1, 2, 3), False, 0.9, False, True),
    ((5, 11, 51, 43), (0.65, 1.38, 0.7, 0.1), (3, 1, 0, 2), False, 1.7, True, False),
    ((17, 2, 19, 25), (1.2, 1.25, 0.8, 0.05), (2, 0, 3, 1), True, 0.4, True, True),
)

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ORDER = np.arange(4, dtype=np.int32)
RECIPE = Recipe(size=SIZE, mean=MEAN, std=STD, solarize=0.2)
# In steps of 1/255, from the views that the device makes alone. The host rounds its crops to uint8,
# and jitter multiplies the rounding by up to 1.4 more than once (measured: 2.4 at most, 0.2 on
# average). With 'none' the host rounds the views too, after a shortened blur (measured: 2.7, 0.3).
DIFFERENCES = {'none': 3.0, 'color': 2.5, 'all': 0.01}


@pytest.fixture(scope='module')
def figures() -> dict[str, np.ndarray]:
    return dict(np.load(pathlib.Path(__file__).parent / 'figures' / 'augmentation.npz'))


@pytest.fixture(scope='module')
def photograph(figures) -> np.ndarray:
    return figures['photograph'].astype(np.float32) / 255


@pytest.fixture(scope='module')
def part(photograph) -> np.ndarray:
    return photograph[14:38, 24:56]


@pytest.fixture(scope='module', params=['device', 'host'])
def back_end(request) -> types.SimpleNamespace:
    """Returns jitter, gray, solarize, blur, crop, rotate of one back end, on numpy arrays.

    Differences from the figures, in steps of 1/255: the host's crops and rotations are uint8,
    and its blur omits the taps beyond three sigmas.
    """
    f32 = np.float32
    if request.param == 'device':

        def by_planes(function):
            def whole(x, *arguments):
                return jnp.stack(function(jnp.unstack(x, axis=-1), *arguments), -1)

            return jax.jit(whole)

        jitter, blur = by_planes(jax_augment.jitter), by_planes(jax_augment.blur)
        crop = jax.jit(jax_augment.crop_resize, static_argnums=2)
        rotate = jax.jit(jax_augment.rotate, static_argnums=(2, 3))
        return types.SimpleNamespace(
            jitter=lambda x, factors, order=ORDER: np.asarray(jitter(x, f32(factors), order)),
            gray=lambda x: np.asarray(by_planes(ops.gray)(x)),
            solarize=lambda x: np.asarray(ops.solarize(x, jnp)),
            blur=lambda x, sigma: np.asarray(blur(x, f32(sigma))),
            crop=lambda x, box: np.asarray(crop(x, tuple(map(f32, box)), SIZE)),
            rotate=lambda x, angle: np.asarray(rotate(x, f32(angle), *x.shape[:2])),
            rounding=0.01,
            taps=0.01,
        )
    tf = lazy_tf.load()

    def planes(function):
        compiled = tf.function(functools.partial(function, tf), jit_compile=True, autograph=False)
        return lambda x, *arguments: np.moveaxis(
            compiled(tf.constant(np.moveaxis(x, -1, 0)), *map(tf.constant, arguments)).numpy(),
            0,
            -1,
        )

    jitter, blur = planes(tf_augment.jitter), planes(tf_augment.blur)
    gray = planes(lambda tf, x: tf.stack(ops.gray(tf.unstack(x))))

    def on_bytes(function):
        return lambda x, *arguments: function(to_bytes(x), *arguments).astype(f32) / 255

    return types.SimpleNamespace(
        jitter=lambda x, factors, order=ORDER: jitter(x, f32(factors), order),
        gray=gray,
        solarize=planes(lambda tf, x: ops.solarize(x, tf)),
        blur=lambda x, sigma: blur(x, f32(sigma)),
        crop=on_bytes(lambda x, box: geometry.crop_resize(x, *box, SIZE, SIZE)),
        rotate=on_bytes(geometry.rotate),
        rounding=0.51,
        taps=0.5,
    )


def to_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.round(x * 255).astype(np.uint8))


class Pngs:
    """A source of PNG images in memory, all of one class."""

    classes = ('one',)
    identity = 'pngs'

    def __init__(self, images: np.ndarray):
        self.encoded = []
        for image in images:
            file = io.BytesIO()
            PIL.Image.fromarray(image.squeeze()).save(file, 'png')
            self.encoded.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.encoded[index], 0

    def name(self, index: int) -> str:
        return f'png {index}'


def close(actual, expected: np.ndarray, steps: float) -> None:
    """Asserts equality within `steps` steps of 1/255; stored figures are 65535ths."""
    if expected.dtype == np.uint16:
        expected = expected / 65535
    np.testing.assert_allclose(actual, expected, rtol=0, atol=steps / 255)


@pytest.mark.parametrize('operation', ['brightness', 'contrast', 'saturation', 'hue'])
def test_color_operations_match_torchvision(back_end, figures, part, operation) -> None:
    place = ('brightness', 'contrast', 'saturation', 'hue').index(operation)
    values = SHIFTS if operation == 'hue' else FACTORS
    for value, expected in zip(values, figures[operation], strict=True):
        factors = [*NEUTRAL[:place], value, *NEUTRAL[place + 1 :]]
        close(back_end.jitter(part, factors), expected, 0.01)
        assert np.abs(part - expected / 65535).max() > 4 / 255  # it does something


def test_gray_matches_torchvision(back_end, figures, part) -> None:
    close(back_end.gray(part)[..., :1], figures['gray'][0], 0.01)


def test_solarize_matches_torchvision(back_end, figures, part) -> None:
    close(back_end.solarize(part), figures['solarize'][0], 0.01)
    as_bytes = to_bytes(part)  # the usual threshold of uint8 is 128
    inverted = np.where(as_bytes >= 128, 255 - as_bytes, as_bytes)
    np.testing.assert_allclose(back_end.solarize(as_bytes / np.float32(255)), inverted / 255)


def test_blur_matches_torchvision(back_end, figures, part) -> None:
    for sigma, expected in zip(SIGMAS, figures['blur'], strict=True):
        close(back_end.blur(part, sigma), expected, back_end.taps)


def test_blur_of_sigma_0_changes_nothing(back_end, part) -> None:
    np.testing.assert_array_equal(back_end.blur(part, 0.0), part)


def test_geometry_is_compiled_without_a_folder_for_the_cache(monkeypatch) -> None:
    from numba.core import caching

    def refuse(self) -> None:
        raise OSError(30, 'Read-only file system')

    monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null/cache')
    monkeypatch.setattr(caching._CacheLocator, 'ensure_cache_path', refuse)
    double = geometry._compiled(lambda x: 2 * x)
    assert double(2) == 4


def test_crop_resize_matches_torchvision(back_end, figures, photograph) -> None:
    for box, expected in zip(BOXES, figures['crop'], strict=True):
        close(back_end.crop(photograph, box), expected, back_end.rounding)


def test_rotate_matches_torchvision_of_opposite_sign(back_end, figures, part) -> None:
    # A positive angle turns clockwise here, counter-clockwise there: the range is symmetric.
    for angle, expected in zip(ANGLES, figures['rotate'], strict=True):
        close(back_end.rotate(part, -np.radians(angle)), expected, back_end.rounding)
        turned_back = back_end.rotate(part, np.radians(angle))
        assert np.abs(turned_back - expected / 65535).max() > 0.2


def test_center_crop_matches_torchvision(figures) -> None:
    image = figures['photograph']
    center = jax.jit(jax_augment.center, static_argnums=(1, 2))
    for resize, expected in zip(RESIZES, figures['center'], strict=True):
        close(center(image[None], SIZE, resize)[0], expected, 0.01)
        batches = host.eval_batches(
            Reader(Pngs(image[None]), 3),
            batch_size=1,
            size=SIZE,
            resize=resize,
            local=slice(0, 1),
        )
        ((images, _, _),) = batches
        close(images[0] / 255, expected, 0.51)  # half a step is the rounding to uint8


def crop_parameters(box: tuple[int, ...], height: int, width: int) -> dict[str, np.ndarray]:
    """Returns parameters with which recipe.crop_box chooses this box."""
    top, left, h, w = box
    place = (top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)
    return {
        'area': np.full(10, h * w / (height * width), np.float32),
        'ratio': np.full(10, w / h, np.float32),
        'position': np.array(place, np.float32),
    }


def test_whole_augmentation_matches_torchvision(monkeypatch, figures) -> None:
    image = figures['photograph']
    cases = [
        {
            **crop_parameters(box, *image.shape[:2]),
            'angle': np.float32(0),
            'factors': np.array(factors, np.float32),
            'order': np.array(order, np.int32),
            'gray': np.bool_(gray),
            'sigma': np.float32(sigma),
            'solarize': np.bool_(solarize),
            'flip': np.bool_(flip),
        }
        for box, factors, order, gray, sigma, solarize, flip in CHAINS
    ]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)
    expected = figures['chain']
    images = np.stack([image] * len(cases))

    views = jax.jit(functools.partial(jax_augment.augment, recipe=RECIPE))(images, params)
    close((views - expected) * np.array(STD), np.zeros_like(expected), 0.01)

    indices = np.arange(len(cases))
    monkeypatch.setattr(host, 'sample_batch_params', lambda *_: (indices, [params]))
    for on_device, steps in DIFFERENCES.items():
        (batch,) = host.train_batches(
            Reader(Pngs(images), 3),
            IndexSampler(0, len(cases), len(cases)),
            (RECIPE,),
            on_device=on_device,
            canvas=96,
            start=0,
            stop=1,
            local=slice(0, len(cases)),
        )
        (views,) = to_views(batch, (RECIPE,))
        close((views - expected) * np.array(STD), np.zeros_like(expected), steps)


# CPUs color several images at a time; 19 are no multiple of them.
def test_each_image_gets_its_own_colors(photograph) -> None:
    images = np.stack([np.uint8(255 * photograph[y : y + 32, y : y + 32]) for y in range(19)])
    params = recipe.sample(RECIPE, np.random.default_rng(3), len(images))
    views = jax.jit(functools.partial(jax_augment.augment, recipe=RECIPE))
    singly = [
        views(images[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}) for i in range(19)
    ]
    close(views(images, params), np.concatenate(singly), 0.01)


@functools.partial(jax.jit, static_argnums=1)
def to_views(batch, recipes: tuple[Recipe, ...]) -> list[jax.Array]:
    return host.to_views(batch, recipes)


def cut(photograph: np.ndarray, channels: int) -> np.ndarray:
    corners = itertools.product(range(0, 20, 5), range(0, 20, 5))
    images = np.stack([photograph[y : y + 44, x : x + 60] for y, x in corners])
    return images[..., :channels]


def harsh(channels: int, rotation: float) -> Recipe:
    return Recipe(
        size=18,
        crop_scale=(0.05, 0.3),
        rotation=rotation,
        jitter=1.0,
        hue=0.5,
        gray=0.2,
        solarize=0.4,
        mean=(0.5,),
        std=(0.5,),
    ).for_channels(channels)


def batches_of(images: np.ndarray, view: Recipe, on_device: str, canvas: int) -> list:
    return list(
        host.train_batches(
            Reader(Pngs(images), images.shape[-1]),
            IndexSampler(3, len(images), 8),
            (view,),
            on_device=on_device,
            canvas=canvas,
            start=0,
            stop=4,
            local=slice(0, 8),
        )
    )


# Without rotation the device fuses crop and colors; rounding in that fusion once shifted hues.
@pytest.mark.parametrize(
    ('on_device', 'channels', 'rotation'),
    [
        ('none', 3, 30.0),
        ('color', 3, 0.0),
        ('color', 1, 20.0),
        ('all', 3, 0.0),
        ('all', 3, 30.0),
        ('all', 1, 20.0),
    ],
)
def test_train_batches_of_host_and_device_agree(figures, channels, rotation, on_device) -> None:
    images, view = cut(figures['photograph'], channels), harsh(channels, rotation)
    sampler = IndexSampler(3, len(images), 8)
    for step, batch in enumerate(batches_of(images, view, on_device, canvas=64)):
        assert {'none': 'crops', 'color': 'crops', 'all': 'image'}[on_device] in batch
        indices, views = recipe.sample_batch_params(sampler, (view,), step, slice(0, 8))
        # The batch of a dataset cached on the device.
        (expected,) = to_views({'image': images[indices], 'views': views}, (view,))
        (actual,) = to_views(batch, (view,))
        close(0.5 * (actual - expected), np.zeros(expected.shape), DIFFERENCES[on_device])


def test_canvas_shrinks_larger_images(figures) -> None:
    images, view = cut(figures['photograph'], 3), harsh(3, 0.0)
    sampler = IndexSampler(3, len(images), 8)
    for step, batch in enumerate(batches_of(images, view, 'all', canvas=40)):
        np.testing.assert_array_equal(batch['size'], [[29, 40]] * 8)
        assert not batch['image'][:, 29:].any()
        indices, views = recipe.sample_batch_params(sampler, (view,), step, slice(0, 8))
        small = batch['image'][:, :29]
        for image, shrunk in zip(images[indices], small, strict=True):
            pil = PIL.Image.fromarray(image).resize((40, 29), PIL.Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(pil).astype(int) - shrunk).max() <= 1
        (expected,) = to_views({'image': small, 'views': views}, (view,))
        (actual,) = to_views(batch, (view,))
        close(0.5 * (actual - expected), np.zeros(expected.shape), DIFFERENCES['all'])


def test_canvas_keeps_a_pixel_of_thin_images() -> None:
    image = np.full((1, 2, 900, 3), 200, np.uint8)
    (batch, *_) = batches_of(np.repeat(image, 8, 0), harsh(3, 0.0), 'all', canvas=32)
    np.testing.assert_array_equal(batch['size'], [[1, 32]] * 8)
    np.testing.assert_array_equal(batch['image'][:, :1], 200)


def test_operations_on_5_channels(back_end, photograph) -> None:
    five = photograph[..., [0, 1, 2, 0, 1]]
    plain = Recipe(mean=(0.5,), std=(0.5,)).for_channels(5)
    assert (plain.saturation, plain.hue, plain.gray) == (0, 0, 0)
    np.testing.assert_array_equal(back_end.jitter(five, (1.0, 1.0, 0.5, 0.2)), five)
    np.testing.assert_array_equal(back_end.gray(five), five)
    bright = back_end.jitter(five, (1.5, 1.0, 1.0, 0.0))
    np.testing.assert_allclose(bright, np.minimum(1.5 * five, 1), rtol=0, atol=1e-6)
    contrast = back_end.jitter(five, (1.0, 0.5, 1.0, 0.0))
    np.testing.assert_allclose(contrast, 0.5 * five + 0.5 * five.mean(), rtol=0, atol=1e-5)
    for operation in (
        lambda x: back_end.blur(x, 1.0),
        lambda x: back_end.crop(x, BOXES[1]),
        lambda x: back_end.rotate(x, 0.3),
    ):
        np.testing.assert_allclose(
            operation(five)[..., :3], operation(photograph), rtol=0, atol=1e-6
        )


def test_recipe_for_1_channel_disables_color_operations(caplog) -> None:
    one = Recipe(mean=(0.5,), std=(0.5,)).for_channels(1)
    assert (one.saturation, one.hue, one.gray) == (0, 0, 0)
    assert (one.brightness, one.contrast, one.blur) == (0.4, 0.4, 0.5)
    assert 'saturation, hue and gray are disabled' in caplog.text
    assert Recipe().for_channels(3) == Recipe()


def crop_boxes(shape: tuple[int, int], params: dict[str, np.ndarray]) -> np.ndarray:
    height, width = map(jnp.float32, shape)
    ratio = Recipe().crop_ratio
    boxes = jax.vmap(lambda p: recipe.crop_box(p, height, width, ratio, jnp))(params)
    return np.array(boxes)


@pytest.mark.parametrize('shape', [(375, 500), (120, 600), (600, 60)])
def test_crop_box_distribution_matches_torchvision(figures, shape) -> None:
    height, width = shape
    n = 40_000
    params = recipe.sample(Recipe(), np.random.default_rng(0), n)
    top, left, h, w = crop_boxes(shape, {k: params[k] for k in ('area', 'ratio', 'position')})
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    draws = (
        h * w / (height * width),
        np.log(w / h),
        (top + 0.5) / (height - h + 1),
        (left + 0.5) / (width - w + 1),
    )
    levels = np.linspace(0.05, 0.95, 19)
    bound = 1.95 * np.sqrt(2 / n)  # Kolmogorov-Smirnov at 0.001; both have n draws
    for drawn, quantiles in zip(draws, figures[f'quantiles_{height}x{width}'], strict=True):
        # If many draws are equal, as in the fallback, a quantile stands for a range of levels.
        below = np.mean(drawn[:, None] < quantiles - 1e-5, axis=0)
        up_to = np.mean(drawn[:, None] < quantiles + 1e-5, axis=0)
        assert (below - levels).max() < bound
        assert (levels - up_to).max() < bound


def test_crop_box_is_equal_in_numpy_and_jax() -> None:
    params = recipe.sample(Recipe(), np.random.default_rng(1), 60)
    params = {k: params[k] for k in ('area', 'ratio', 'position')}
    for shape in ((375, 500), (120, 600), (17, 16)):
        height, width = map(np.float32, shape)
        expected = crop_boxes(shape, params)
        sizes = np.full(60, height), np.full(60, width)
        boxes = recipe.crop_box(params, *sizes, Recipe().crop_ratio, np)
        np.testing.assert_array_equal(np.array(boxes), expected)


def test_sample_has_probabilities_and_ranges() -> None:
    n = 24_000
    made = Recipe(jitter=0.7, gray=0.2, blur=0.45, flip=0.3, solarize=0.6, rotation=10.0)
    params = recipe.sample(made, np.random.default_rng(0), n)
    jittered = (params['factors'] != NEUTRAL).any(1)
    happened = {
        'jitter': jittered,
        'gray': params['gray'],
        'blur': params['sigma'] > 0,
        'flip': params['flip'],
        'solarize': params['solarize'],
    }
    for key, flags in happened.items():
        p = getattr(made, key)
        assert abs(flags.mean() - p) < 4 * np.sqrt(p * (1 - p) / n), key
    flags = np.stack(list(happened.values())).astype(float)
    assert np.abs(np.corrcoef(flags) - np.eye(5)).max() < 4 / np.sqrt(n)

    def is_uniform(values: np.ndarray, low: float, high: float) -> None:
        values = np.sort(values)
        levels = (np.arange(len(values)) + 0.5) / len(values)
        gap = np.abs((values - low) / (high - low) - levels).max()
        assert gap < 1.95 / np.sqrt(len(values))

    for i, x in enumerate((made.brightness, made.contrast, made.saturation)):
        is_uniform(params['factors'][jittered, i], 1 - x, 1 + x)
    is_uniform(params['factors'][jittered, 3], -made.hue, made.hue)
    is_uniform(params['sigma'][happened['blur']], *made.blur_sigma)
    is_uniform(np.degrees(params['angle']), -10, 10)

    _, counts = np.unique(params['order'], axis=0, return_counts=True)
    assert len(counts) == 24
    assert (np.square(counts - n / 24) / (n / 24)).sum() < 49.7  # chi-square, 23, at 0.001


def test_sample_strength_above_1_stops_at_factor_0() -> None:
    params = recipe.sample(Recipe(jitter=1.0, brightness=1.5), np.random.default_rng(0), 2000)
    brightness = params['factors'][:, 0]
    assert 0 <= brightness.min() < 0.01
    assert 2.49 < brightness.max() < 2.5


@pytest.mark.parametrize(
    'wrong',
    [
        {'size': 0, 'blur': 0.0},
        {'size': 6},
        {'crop_scale': (0.0, 1.0)},
        {'crop_scale': (0.5, 0.2)},
        {'crop_scale': (0.5, 1.5)},
        {'crop_ratio': (-1.0, 1.0)},
        {'blur_sigma': (0.0, 2.0)},
        {'rotation': -5.0},
        {'jitter': 1.1},
        {'gray': -0.1},
        {'blur': float('nan')},
        {'flip': 2.0},
        {'solarize': -0.2},
        {'brightness': -0.4},
        {'contrast': float('inf')},
        {'saturation': -0.1},
        {'hue': 0.6},
        {'std': (0.2, 0.0, 0.2)},
    ],
)
def test_recipe_names_value_out_of_range(wrong) -> None:
    with pytest.raises(errors.UserError, match=rf'^augment\.{next(iter(wrong))} is '):
        Recipe(**wrong)


def test_recipe_mean_and_std_must_fit_the_channels() -> None:
    with pytest.raises(errors.UserError, match=r'augment\.mean has 3 values .* expected 1 or 5'):
        Recipe().for_channels(5)
