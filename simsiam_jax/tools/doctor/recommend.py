"""The recipe that fits some images: what to change in a configuration, with the reason."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax.data.survey import DatasetSurvey

# Sides in pixels. Below TINY the CIFAR recipe's four stages have nothing left to halve; to SMALL
# the CIFAR stem keeps the resolution that ImageNet's would quarter; LARGE is the paper's view.
TINY, SMALL, LARGE = 16, 64, 224
# What views a CPU is left with.
_CPU_SIZE = 32
# Images: the paper's two sets have 50,000 (ResNet-18) and 1.28 million (ResNet-50).
_SMALL_SET, _LARGE_SET = 50_000, 1_000_000
_BATCHES = 8  # an epoch should have
_CROP = 6  # pixels on a side, of the smallest crop


@dataclasses.dataclass(frozen=True)
class Advice:
    """A key of the configuration, the value it should have, and why."""

    key: str
    value: Any
    reason: str


def recommend(
    survey: DatasetSurvey, distinct: int, config: ConfigDict, *, devices: int, accelerator: bool
) -> list[Advice]:
    """What to change in `config`, a pre-training; nothing where it fits.

    The network, the heads and the optimizer are left alone where the method is not simsiam.

    Args:
      survey: of the images, some of which can be read.
      distinct: images of the source that are not a copy of another.
      devices: of all processes.
      accelerator: whether they are more than CPUs.
    """
    side = int(np.median(survey.sides().min(1)))
    size, size_reason = _size(side, accelerator)
    batch, batch_reason = _batch(config.batch_size, min(distinct, survey.count), devices)
    wanted = [
        *_data(survey, config),
        Advice('augment.size', size, size_reason),
        *_augment(size, channels_of(survey), config),
        Advice('batch_size', batch, batch_reason),
    ]
    if config.method.name == 'simsiam':
        wanted += _network(size, distinct, config, accelerator)
        wanted += _schedule(size, distinct, batch, config, accelerator)
    wanted += _intervals(wanted, distinct // batch, config)
    given = flatten_dict(config.to_dict(), sep='.')
    return [advice for advice in wanted if not _same(advice.value, given.get(advice.key))]


def apply(config: ConfigDict, advice: list[Advice]) -> ConfigDict:
    """A copy of the configuration with what is advised."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict({a.key: a.value for a in advice})
    return changed


def _same(a: Any, b: Any) -> bool:
    return tuple(a) == tuple(b) if isinstance(a, tuple) and b is not None else a == b


def channels_of(survey: DatasetSurvey) -> int:
    """What config.data.channels should be."""
    kinds = survey.channels()
    if set(kinds) <= {1, 3}:
        return 1 if all(look.gray for look in survey.looks) else 3
    return next(iter(kinds))


def _data(survey: DatasetSurvey, config: ConfigDict) -> list[Advice]:
    channels, advice = channels_of(survey), []
    what = {1: 'every image is gray', 3: 'the images have colors'}
    advice.append(
        Advice(
            'data.channels', channels, what.get(channels, f'the images have {channels} channels')
        )
    )
    bad = survey.bad_fraction
    if config.data.max_bad_fraction < bad <= 0.2:
        advice.append(
            Advice(
                'data.max_bad_fraction',
                math.ceil(120 * bad) / 100,
                f'{bad:.1%} cannot be read; better: mend them or take them out',
            )
        )
    if config.data.normalize == 'given' and not _normalizes(survey, channels, config):
        found = survey.normalization(next(iter(survey.channels())))
        advice.append(
            Advice(
                'data.normalize',
                'auto',
                f'measured mean {found["mean"]} and std {found["std"]}, not those given',
            )
        )
    return advice


def _normalizes(survey: DatasetSurvey, channels: int, config: ConfigDict) -> bool:
    """Whether the given mean and std bring the images to about 0 and 1."""
    augment = config.augment
    if len(augment.mean) not in (1, channels) or len(augment.std) not in (1, channels):
        return False
    if augment.rotation:
        return True  # corners are filled with 0, which a mean of 0 keeps apart from no image
    if channels not in survey.channels():
        return False
    found = survey.normalization(channels)
    mean = (np.array(found['mean']) - augment.mean) / augment.std
    std = np.array(found['std']) / augment.std
    return bool(np.abs(mean).max() < 0.5 and std.min() > 0.5 and std.max() < 2)


def _size(side: int, accelerator: bool) -> tuple[int, str]:
    if side > _CPU_SIZE and not accelerator:
        return _CPU_SIZE, 'there is no GPU or TPU: what a CPU can do; with one leave this out'
    if side <= SMALL:
        return side, f'the images have {side} pixels: larger views would only enlarge them'
    if side < LARGE:
        size = side // 32 * 32
        return size, f'the images have {side} pixels; a multiple of 32, which the network halves to'
    return LARGE, "the paper's"


def _augment(size: int, channels: int, config: ConfigDict) -> list[Advice]:
    """Given the views' size; a crop's scale is judged by the image at that size."""
    advice = []
    if channels != 3:
        for key in ('saturation', 'hue', 'gray'):
            advice.append(Advice(f'augment.{key}', 0.0, 'only RGB images have colors to change'))
    low, high = config.augment.crop_scale
    least = min(1.0, math.ceil(10 * (_CROP / size) ** 2) / 10)
    if low < least:
        advice.append(
            Advice(
                'augment.crop_scale',
                (least, high),
                f'the smallest crops would have under {_CROP} pixels on a side',
            )
        )
    if size <= SMALL:
        advice.append(
            Advice('augment.blur', 0.0, 'small views have no blur (the paper, App. D, CIFAR-10)')
        )
    if size <= SMALL:
        resize, reason = size, 'small images are judged whole'
    else:
        resize, reason = round(size * 256 / 224), "the paper's 256 for 224"
    if config.eval.resize or size != config.augment.size:
        advice.append(Advice('eval.resize', resize, reason))
    return advice


def _batch(given: int, distinct: int, devices: int) -> tuple[int, str]:
    most = distinct // _BATCHES
    if given % devices == 0 and 64 <= given <= min(most, 2048):
        return given, ''
    batch = min(256, 2 ** int(math.log2(max(most, 16))))
    batch = max(1, batch // devices) * devices
    if given > most:
        return batch, f'{distinct:,} different images: {_BATCHES} batches an epoch, or at least 16'
    return batch, "64 to 2048 work (the paper's Table 2), 256 and 512 best; all devices alike"


def _network(size: int, distinct: int, config: ConfigDict, accelerator: bool) -> list[Advice]:
    advice = []
    if size < TINY or not accelerator:
        why = (
            'so few pixels: the network measured on 8x8 digits (configs/quickstart.py)'
            if size < TINY
            else "there is no GPU or TPU: configs/quickstart.py's network, for a CPU"
        )
        if tuple(config.model.stages) != (1, 1, 1) or config.model.width_multiplier > 0.25:
            advice += [
                Advice('model.name', 'resnet18', why),
                Advice('model.stages', (1, 1, 1), why),
                Advice('model.width_multiplier', 0.25, why),
                Advice('model.zero_init_residual', False, why),
                Advice('method.dim', 128, why),
                Advice('method.predictor_hidden_dim', 32, why),
            ]
    elif (size <= SMALL or distinct <= _SMALL_SET) and distinct < _LARGE_SET:
        if config.model.name not in ('resnet18', 'resnet34'):
            reason = "the paper's network for CIFAR-10's 50,000 images (App. D)"
            advice.append(Advice('model.name', 'resnet18', reason))
    elif config.model.name in ('resnet18', 'resnet34'):
        reason = (
            "the paper's; a small network on many images may collapse in part (Li et al., 2022)"
        )
        advice.append(Advice('model.name', 'resnet50', reason))
    stem = 'cifar' if size <= SMALL else 'imagenet'
    reason = {
        'cifar': 'no stride and no pooling at the start: small views keep their pixels (App. D)',
        'imagenet': 'views above 64 pixels: the stem of CIFAR would cost sixteen times as much',
    }[stem]
    advice.append(Advice('model.stem', stem, reason))
    if not accelerator:
        advice.append(Advice('model.dtype', 'float32', "configs/quickstart.py's, for a CPU"))
    if TINY <= size <= SMALL and accelerator:
        advice.append(Advice('method.projector_layers', 2, 'two layers for small images (App. D)'))
    return advice


def _schedule(
    size: int, distinct: int, batch: int, config: ConfigDict, accelerator: bool
) -> list[Advice]:
    advice = []
    little = size < TINY or not accelerator
    if little:
        rate, reason = 0.8, "configs/quickstart.py's, measured on digits with this network"
    elif size <= SMALL:
        rate, reason = 0.03, "the paper's on CIFAR-10 (App. D), times batch/256"
    else:
        rate, reason = 0.05, "the paper's, times batch/256"
    if config.optim.name == 'sgd':
        if not rate / 1.5 < config.optim.learning_rate < rate * 1.5:
            advice.append(Advice('optim.learning_rate', rate, reason))
        decay, where = (5e-4, 'App. D') if size <= SMALL else (1e-4, "the paper's")
        advice.append(Advice('optim.weight_decay', decay, f'for views of {size} pixels ({where})'))
    if little:
        epochs, reason = 200, "configs/quickstart.py's; more help, if there is time"
    elif distinct < 2 * _SMALL_SET:
        epochs, reason = 800, 'few images are seen more often: 800 on CIFAR-10 (App. D)'
    elif distinct < _LARGE_SET:
        epochs, reason = 200, 'between 800 for 50,000 images and 100 for 1.28 million'
    else:
        epochs, reason = 100, "the paper's; 800 gain 3.2 points (Table 4)"
    if config.epochs < epochs:
        advice.append(Advice('epochs', epochs, reason))
    if batch >= 1024 and not config.optim.warmup_epochs:
        advice.append(Advice('optim.warmup_epochs', 10, "the paper's for batches of 1024 and more"))
    return advice


def _intervals(wanted: list[Advice], steps: int, config: ConfigDict) -> list[Advice]:
    """Checkpoints not more often than every hundred steps."""
    epochs = next((a.value for a in wanted if a.key == 'epochs'), config.epochs)
    every = min(epochs, math.ceil(100 / max(steps, 1)))
    if config.checkpoint.every_epochs >= every:
        return []
    reason = f'an epoch is only {max(steps, 1)} steps'
    return [Advice('checkpoint.every_epochs', float(every), reason)]
