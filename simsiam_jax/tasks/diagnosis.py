"""Diagnosis of a collapse: possible causes in the configuration and the images."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.data import sampler, survey
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.models import resnet
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.training import guard
from simsiam_jax.training.monitor import RepresentationMetrics

# Optimizer -> usual base learning rate, and highest rate in the papers, batch_size/256 included:
# that of SimSiam and of BYOL at batch 4096.
_RATES = {'sgd': (0.05, 0.8), 'lars': (0.3, 7.2)}

_AUGMENT = (
    '--config.augment.crop_scale=0.2,1.0 --config.augment.jitter=0.8 '
    '--config.augment.brightness=0.4 --config.augment.contrast=0.4'
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A possible cause of a collapse.

    Attributes:
      text: The cause.
      remedy: What to try: overrides of the configuration if there are any.
    """

    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """Statistics of the training images.

    Attributes:
      images: Number of images.
      duplicates: Share of a sample of the images that has a near-duplicate in the sample.
    """

    images: int
    duplicates: float


def sample_dataset(source: ImageSet, sample: int = 64) -> DatasetStats:
    """Returns statistics of `sample` images spread evenly over the source.

    survey.near_duplicates defines which images are near-duplicates.
    """
    indices = sampler.evenly_spaced(len(source), sample)
    thumbs = []
    for index in indices:
        if isinstance(source, ArraySource):
            image = source.images[index]
        else:
            image, _ = source.example(int(index))
        thumbs.append(survey.thumbnail(image))
    stacked = np.stack(thumbs)
    # In reverse order, the first image of each group has an earlier near-duplicate too.
    earlier = survey.near_duplicates(stacked) >= 0
    later = survey.near_duplicates(stacked[::-1])[::-1] >= 0
    return DatasetStats(len(source), float((earlier | later).mean()))


def causes(config: ConfigDict, now: RepresentationMetrics, data: DatasetStats) -> list[Diagnosis]:
    """Returns possible causes of a collapse, most likely first.

    Causes that leave nothing to learn come first, then settings that are known to collapse, then
    values outside the usual range. Fixes that are worth a try in any case come last.

    Args:
      config: Configuration of the run.
      now: Metrics at the collapse.
      data: Statistics of the training images.
    """
    return [
        *_dataset_causes(now, data),
        *_method_causes(config),
        *_optimization_causes(config, now, data),
    ]


def _dataset_causes(now: RepresentationMetrics, data: DatasetStats) -> list[Diagnosis]:
    causes = []
    if data.duplicates > guard.DUPLICATES:
        causes.append(
            Diagnosis(
                f'{data.duplicates:.0%} of the sampled images are near-duplicates, so there is '
                'little to discriminate',
                'other images in --config.data.source, or removing the duplicates',
            )
        )
    if now.view_distance < guard.SAME_VIEWS:
        causes.append(
            Diagnosis(
                'the two views of an image are nearly identical (their distance is '
                f'{now.view_distance:.2g} of the distance between images), so there is no '
                'invariance to learn',
                _AUGMENT,
            )
        )
    return causes


def _method_causes(config: ConfigDict) -> list[Diagnosis]:
    method, causes = config.method, []
    if method.name in ('simsiam', 'swav') and not method.stop_gradient:
        causes.append(Diagnosis('the stop-gradient is off', '--config.method.stop_gradient=True'))
    if method.name == 'simsiam':
        if not method.predictor:
            causes.append(Diagnosis('there is no predictor', '--config.method.predictor=True'))
        elif config.optim.predictor_schedule == 'fixed':
            causes.append(
                Diagnosis(
                    'the predictor does not learn', '--config.optim.predictor_schedule=constant'
                )
            )
        if not method.projector_hidden_bn and not method.projector_output_bn:
            keys = ('projector_hidden_bn', 'projector_output_bn', 'predictor_hidden_bn')
            remedy = ' '.join(f'--config.method.{key}=True' for key in keys)
            causes.append(Diagnosis('there is no BN in the heads', remedy))
        elif not method.projector_output_bn:
            causes.append(
                Diagnosis(
                    "there is no BN on the projector's output",
                    '--config.method.projector_output_bn=True',
                )
            )
    if method.name == 'moving_average' and not method.average:
        causes.append(
            Diagnosis(
                'there is neither a predictor nor a moving average', '--config.method.average=0.8'
            )
        )
    return causes


def _optimization_causes(
    config: ConfigDict, now: RepresentationMetrics, data: DatasetStats
) -> list[Diagnosis]:
    optim, causes = config.optim, []
    scaled = optim.learning_rate * config.batch_size / 256
    usual, highest = _RATES[optim.name]
    if scaled > highest:
        causes.append(
            Diagnosis(
                f'the learning rate is {scaled:.3g} (base {optim.learning_rate:g} x batch '
                f'{config.batch_size}/256), above {highest:g}',
                f'--config.optim.learning_rate={usual:g}',
            )
        )
    if config.batch_size >= 1024 and not optim.warmup_epochs:
        causes.append(
            Diagnosis(
                f'a batch of {config.batch_size} starts without warm-up',
                '--config.optim.warmup_epochs=10',
            )
        )
    # BN is synchronized over the devices, so its statistics cover the batch or an accumulated part.
    images = config.method.get('bn_group', config.batch_size // optim.gradient_accumulation_steps)
    if images < 32:
        key = 'method.bn_group=32' if 'bn_group' in config.method else 'batch_size=64'
        text = f'BN statistics are computed over only {images} images'
        causes.append(Diagnosis(text, f'--config.{key}'))
    if guard.SAME_VIEWS <= now.view_distance < 0.3:
        causes.append(
            Diagnosis(
                'the augmentation is weak (the distance between the views of an image is '
                f'{now.view_distance:.2g} of the distance between images)',
                _AUGMENT,
            )
        )
    causes.append(
        Diagnosis(
            f'the learning rate, base {optim.learning_rate:g}, may be too high for these images',
            f'--config.optim.learning_rate={optim.learning_rate / 4:g}',
        )
    )
    name = config.model.name
    narrow = name in resnet.RESNETS and config.model.width_multiplier < 1
    small = name in ('resnet18', 'resnet34') or narrow
    if small and data.images >= 100_000 and config.method.name in ('simsiam', 'byol'):
        causes.append(
            Diagnosis(
                f'the network is small for {data.images} images (Li et al., 2022)',
                '--config.model.name=resnet50 --config.model.width_multiplier=1',
            )
        )
    return causes
