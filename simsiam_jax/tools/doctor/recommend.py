"""Recommends what to change in a configuration for given images and devices, with the reasons."""

import copy
import dataclasses
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax import config_keys
from simsiam_jax.data.survey import DatasetSurvey
from simsiam_jax.models import resnet

# Value of a key and its source.
Settings = dict[str, tuple[Any, str]]

# Sides of the views in pixels. Below TINY the four stages of the CIFAR network have nothing left to
# halve. Up to SMALL the CIFAR stem keeps the resolution, which ImageNet's would quarter. LARGE is
# the paper's size.
TINY, SMALL, LARGE = 16, 64, 224
# Side of the views on a CPU.
_CPU_SIZE = 32
# Images in the paper's two sets: CIFAR-10 (for ResNet-18) and, rounded, ImageNet (for ResNet-50).
_SMALL_SET, _LARGE_SET = 50_000, 1_000_000
_BATCHES = 8  # minimum per epoch
_CROP = 6  # pixels on a side of the smallest crop
_TINY_CROP = 0.5  # smallest crop's share of the image, for the tiny network
_SMALL_NETWORKS = ('resnet18', 'resnet34')

_MEASURED = 'measured on digits of 8x8 pixels on a CPU (configs/quickstart.py)'
_CIFAR = "the paper's on CIFAR-10 (App. D)"
_IMAGENET = "the paper's on ImageNet"

_TINY_NETWORK = {
    'model.name': 'resnet18',
    'model.stages': (1, 1, 1),
    'model.width_multiplier': 0.25,
    'model.zero_init_residual': False,
    'method.dim': 128,
    'method.predictor_hidden_dim': 32,
}
# tiny: views below TINY pixels, or no accelerator; small: views up to SMALL; large: larger views.
PROFILES: dict[str, Settings] = {
    'tiny': {
        'augment.blur': (0.0, f'small views are not blurred: {_CIFAR}'),
        **{key: (value, _MEASURED) for key, value in _TINY_NETWORK.items()},
        'model.stem': ('cifar', f'no stride or pooling at the start keeps the pixels: {_CIFAR}'),
        'optim.learning_rate': (0.8, f'{_MEASURED}; times batch/256'),
        'optim.weight_decay': (5e-4, _CIFAR),
        'epochs': (200, f'{_MEASURED}; more help if there is time'),
    },
    'small': {
        'augment.blur': (0.0, f'small views are not blurred: {_CIFAR}'),
        'model.name': ('resnet18', f'{_CIFAR}, 50,000 images'),
        'model.stem': ('cifar', f'no stride or pooling at the start keeps the pixels: {_CIFAR}'),
        'method.projector_layers': (2, _CIFAR),
        'optim.learning_rate': (0.03, f'{_CIFAR}, times batch/256'),
        'optim.weight_decay': (5e-4, _CIFAR),
    },
    'large': {
        'model.name': (
            'resnet50',
            f'{_IMAGENET}; a small network on many images may collapse in part (Li et al., 2022)',
        ),
        'model.stem': ('imagenet', 'for views above 64 pixels the CIFAR stem costs 16 times more'),
        'optim.learning_rate': (0.05, f'{_IMAGENET}, times batch/256'),
        'optim.weight_decay': (1e-4, _IMAGENET),
    },
}
# Distinct images (fewer than this), epochs, and their source; on accelerators.
_EPOCHS = (
    (2 * _SMALL_SET, 800, f'few images need more epochs: {_CIFAR}'),
    (_LARGE_SET, 200, 'between 800 for 50,000 images and 100 for 1.28 million'),
    (math.inf, 100, f'{_IMAGENET}; 800 gain 3.2 points (Table 4)'),
)


@dataclasses.dataclass(frozen=True)
class Advice:
    """A key of the configuration, the recommended value, and the reason."""

    key: str
    value: Any
    reason: str


def recommend(
    survey: DatasetSurvey,
    distinct: int,
    config: ConfigDict,
    *,
    devices: int,
    accelerator: bool,
    given: Collection[str] = (),
) -> list[Advice]:
    """Returns what to change in the configuration; nothing if it fits.

    The network, the heads and the optimizer of methods other than simsiam are kept.

    Args:
      survey: Survey of the images, some of which can be read.
      distinct: Number of images that are no copy of another.
      config: Configuration of a pre-training.
      devices: Number of devices of all processes; the batch is a multiple of it.
      accelerator: Whether the devices are more than CPUs.
      given: Keys that are kept. The advice on other keys assumes their values, and what would be
        recommended for them is in the result, too.
    """
    side = int(np.median(survey.sides().min(1)))
    advised_size = _size(side, accelerator)
    size = config.augment.size if 'augment.size' in given else advised_size[0]
    name = 'tiny' if size < TINY or not accelerator else 'small' if size <= SMALL else 'large'
    advised_batch = _batch(config.batch_size, min(distinct, survey.count), devices)
    batch = config.batch_size if 'batch_size' in given else advised_batch[0]
    profile = _adapted(name, distinct, batch, config, accelerator)
    if config.method.name != 'simsiam':
        profile = {key: setting for key, setting in profile.items() if key.startswith('augment.')}
    wanted: Settings = {
        **_data(survey, config),
        'augment.size': advised_size,
        **_augment(size, side, channels_of(survey), config, tiny=name == 'tiny'),
        'batch_size': advised_batch,
        **profile,
    }
    epochs = config.epochs
    if 'epochs' in wanted and 'epochs' not in given:
        epochs = max(epochs, wanted['epochs'][0])
    steps = max(survey.count // batch, 1)
    every = float(min(epochs, math.ceil(100 / steps)))  # at least 100 steps between checkpoints
    wanted['checkpoint.every_epochs'] = (every, f'an epoch has only {steps} steps')
    present = config_keys.flat(config)
    return [
        Advice(key, value, reason)
        for key, (value, reason) in wanted.items()
        if not _fits(key, present.get(key), value)
    ]


def apply(config: ConfigDict, advice: list[Advice]) -> ConfigDict:
    """Returns a copy of the configuration that follows the advice."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict({a.key: a.value for a in advice})
    return changed


def _fits(key: str, given: Any, value: Any) -> bool:
    """Returns whether a given value is as good as the recommended one."""
    if key == 'model.name':
        return (given in _SMALL_NETWORKS) == (value in _SMALL_NETWORKS)
    if key == 'optim.learning_rate':
        return value / 1.5 < given < value * 1.5
    if key in ('epochs', 'checkpoint.every_epochs'):
        return given >= value
    if isinstance(value, tuple) and given is not None:
        return tuple(given) == value
    return given == value


def _adapted(
    name: str, distinct: int, batch: int, config: ConfigDict, accelerator: bool
) -> Settings:
    """Returns a profile for a number of images and devices, less what the configuration decides."""
    profile = dict(PROFILES[name])
    if name == 'tiny':
        model = config.model
        if tuple(model.stages) == (1, 1, 1) and model.width_multiplier <= 0.25:  # small enough
            profile = {key: x for key, x in profile.items() if key not in _TINY_NETWORK}
        if not accelerator:
            profile['model.dtype'] = ('float32', f'for a CPU: {_MEASURED}')
    else:
        if name == 'small' and distinct >= _LARGE_SET:
            profile['model.name'] = PROFILES['large']['model.name']
        elif name == 'large' and distinct <= _SMALL_SET:
            profile['model.name'] = PROFILES['small']['model.name']
        epochs = next(row for row in _EPOCHS if distinct < row[0])
        profile['epochs'] = epochs[1:]
    if config.optim.name != 'sgd':
        del profile['optim.learning_rate'], profile['optim.weight_decay']
    if batch >= 1024 and not config.optim.warmup_epochs:
        profile['optim.warmup_epochs'] = (10, "the paper's for batches of 1024 and more")
    if config.model.name not in resnet.RESNETS:
        others = (key for key in profile if not key.startswith('model.') or key == 'model.dtype')
        profile = {key: profile[key] for key in others}
    return profile


def channels_of(survey: DatasetSurvey) -> int:
    """Returns what config.data.channels should be."""
    kinds = survey.channels()
    if set(kinds) <= {1, 3}:
        return 1 if all(image.gray for image in survey.images) else 3
    return next(iter(kinds))


def _data(survey: DatasetSurvey, config: ConfigDict) -> Settings:
    channels = channels_of(survey)
    reasons = {1: 'every image is gray', 3: 'the images have colors'}
    reason = reasons.get(channels, f'the images have {channels} channels')
    settings: Settings = {'data.channels': (channels, reason)}
    bad = survey.bad_fraction
    if config.data.max_bad_fraction < bad <= 0.2:
        settings['data.max_bad_fraction'] = (
            math.ceil(120 * bad) / 100,
            f'{bad:.1%} cannot be read; it is better to fix or remove them',
        )
    if config.data.normalize == 'given' and not _normalizes(survey, channels, config):
        measured = survey.normalization(next(iter(survey.channels())))
        reason = f'measured mean {measured["mean"]} and std {measured["std"]} differ from the given'
        settings['data.normalize'] = ('auto', reason)
    return settings


def _normalizes(survey: DatasetSurvey, channels: int, config: ConfigDict) -> bool:
    """Returns whether the given mean and std normalize the images to about 0 and 1."""
    augment = config.augment
    if len(augment.mean) not in (1, channels) or len(augment.std) not in (1, channels):
        return False
    if augment.rotation:
        return True  # corners are filled with 0, which a mean of 0 keeps distinct from the images
    if channels not in survey.channels():
        return False
    measured = survey.normalization(channels)
    mean = (np.array(measured['mean']) - augment.mean) / augment.std
    std = np.array(measured['std']) / augment.std
    return bool(np.abs(mean).max() < 0.5 and std.min() > 0.5 and std.max() < 2)


def _size(side: int, accelerator: bool) -> tuple[int, str]:
    if side > _CPU_SIZE and not accelerator:
        return _CPU_SIZE, 'no GPU or TPU: the limit of a CPU; omit this with an accelerator'
    if side <= SMALL:
        return side, f'the images have {side} pixels; larger views would only enlarge them'
    if side < LARGE:
        reason = f'the images have {side} pixels; a multiple of 32, by which the network divides'
        return side // 32 * 32, reason
    return LARGE, _IMAGENET


def _augment(size: int, side: int, channels: int, config: ConfigDict, *, tiny: bool) -> Settings:
    """Returns settings for views of a size; the scale of crops assumes images of that size."""
    settings: Settings = {}
    if channels != 3:
        for key in ('saturation', 'hue', 'gray'):
            settings[f'augment.{key}'] = (0.0, 'only RGB images have colors to change')
    low, high = config.augment.crop_scale
    least = min(1.0, math.ceil(10 * (_CROP / size) ** 2) / 10)
    reason = f'the smallest crops would have under {_CROP} pixels on a side'
    if tiny and least < _TINY_CROP:
        least, reason = _TINY_CROP, 'a small network, measured (benchmarks/OWN_IMAGES.md)'
    if low < least:
        settings['augment.crop_scale'] = ((least, high), reason)
    if config.eval.resize or size != config.augment.size:
        images = 'images' if side == size else f'images reduced to {size} pixels'
        settings['eval.resize'] = (
            (size, f'{images} are evaluated whole')
            if size <= SMALL
            else (round(size * 256 / 224), "the paper's 256 for 224")
        )
    return settings


def _batch(given: int, distinct: int, devices: int) -> tuple[int, str]:
    limit = distinct // _BATCHES
    if given % devices == 0 and 64 <= given <= min(limit, 2048):
        return given, ''
    batch = min(256, 2 ** int(math.log2(max(limit, 16))))
    batch = max(1, batch // devices) * devices
    if given > limit:
        reason = f'{distinct:,} distinct images: {_BATCHES} batches per epoch, of at least 16'
        return batch, reason
    return batch, '64 to 2048 work (Table 2), 256 and 512 best; a multiple of the devices'
