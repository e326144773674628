"""Why a training collapses: what in a configuration or its data may bring it about."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.data.sources import ArraySource
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.training import guard
from simsiam_jax.training.monitor import RepresentationMetrics

# The usual base rate, and the highest rate, batch_size/256 included, that the paper's runs have:
# SimSiam's and BYOL's at batch 4096.
_RATES = {'sgd': (0.05, 0.8), 'lars': (0.3, 7.2)}

_AUGMENT = (
    '--config.augment.crop_scale=0.2,1.0 --config.augment.jitter=0.8 '
    '--config.augment.brightness=0.4 --config.augment.contrast=0.4'
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What may be wrong, and what to try: overrides, where there are any."""

    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """Of the images.

    Attributes:
      images: their number.
      duplicates: share of a sample that has a near-duplicate in it.
    """

    images: int
    duplicates: float


def sample_dataset(source: ImageSet, sample: int = 64) -> DatasetStats:
    """Of images spread evenly over the source; these are compared as 16x16 pixels."""
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int)
    small = []
    for index in indices:
        if isinstance(source, ArraySource):
            image = source.images[index]
        else:
            image, _ = source.example(int(index))
        rows, columns = (np.arange(16) * side // 16 for side in image.shape[:2])
        small.append(image[rows][:, columns].astype(np.float32).ravel())
    vectors = np.stack(small)
    squares = np.square(vectors[:, None] - vectors).mean(-1)
    np.fill_diagonal(squares, np.inf)
    # Two levels of 255: what another JPEG of the same picture differs by.
    return DatasetStats(len(source), float((squares.min(1) <= 2**2).mean()))


def causes(config: ConfigDict, now: RepresentationMetrics, data: DatasetStats) -> list[Diagnosis]:
    """What may make this configuration collapse on these images, the likeliest first.

    First what leaves nothing to learn, then what is known to collapse, then what is out of the
    usual range, last what is worth a try in any case.
    """
    return [*_of_the_data(now, data), *_of_the_method(config), *_of_the_scale(config, now, data)]


def _of_the_data(now: RepresentationMetrics, data: DatasetStats) -> list[Diagnosis]:
    found = []
    if data.duplicates > guard.DUPLICATES:
        found.append(
            Diagnosis(
                f'{data.duplicates:.0%} of a sample of the images have a near-duplicate in it: '
                'there is little to tell apart',
                'other images in --config.data.source, or these without the duplicates',
            )
        )
    if now.view_distance < guard.SAME_VIEWS:
        found.append(
            Diagnosis(
                'the two views of an image are the same, or nearly (their distance is '
                f'{now.view_distance:.2g} of that between images): there is nothing to overcome',
                _AUGMENT,
            )
        )
    return found


def _of_the_method(config: ConfigDict) -> list[Diagnosis]:
    method, found = config.method, []
    if method.name in ('simsiam', 'swav') and not method.stop_gradient:
        found.append(Diagnosis('the stop-gradient is off', '--config.method.stop_gradient=True'))
    if method.name == 'simsiam':
        if not method.predictor:
            found.append(Diagnosis('there is no predictor', '--config.method.predictor=True'))
        elif config.optim.predictor_schedule == 'fixed':
            found.append(
                Diagnosis(
                    'the predictor does not learn', '--config.optim.predictor_schedule=constant'
                )
            )
        if not method.projector_hidden_bn and not method.projector_output_bn:
            keys = ('projector_hidden_bn', 'projector_output_bn', 'predictor_hidden_bn')
            tries = ' '.join(f'--config.method.{key}=True' for key in keys)
            found.append(Diagnosis('there is no BN in the heads', tries))
        elif not method.projector_output_bn:
            found.append(
                Diagnosis(
                    "there is no BN on the projector's output",
                    '--config.method.projector_output_bn=True',
                )
            )
    if method.name == 'moving_average' and not method.average:
        found.append(
            Diagnosis('there is neither a predictor nor an average', '--config.method.average=0.8')
        )
    return found


def _of_the_scale(
    config: ConfigDict, now: RepresentationMetrics, data: DatasetStats
) -> list[Diagnosis]:
    optim, found = config.optim, []
    scaled = optim.learning_rate * config.batch_size / 256
    usual, highest = _RATES[optim.name]
    if scaled > highest:
        found.append(
            Diagnosis(
                f'the learning rate is {scaled:.3g} (base {optim.learning_rate:g} x batch '
                f'{config.batch_size}/256), above {highest:g}',
                f'--config.optim.learning_rate={usual:g}',
            )
        )
    if config.batch_size >= 1024 and not optim.warmup_epochs:
        found.append(
            Diagnosis(
                f'a batch of {config.batch_size} starts without warm-up',
                '--config.optim.warmup_epochs=10',
            )
        )
    # BN is synchronized over the devices: the whole batch counts, or the part that is computed.
    share = config.method.get('bn_group', config.batch_size // optim.gradient_accumulation_steps)
    if share < 32:
        key = 'method.bn_group=32' if 'bn_group' in config.method else 'batch_size=64'
        found.append(Diagnosis(f"BN's statistics are of {share} images only", f'--config.{key}'))
    if guard.SAME_VIEWS <= now.view_distance < 0.3:
        found.append(
            Diagnosis(
                'the augmentation is weak (the distance between the views of an image is '
                f'{now.view_distance:.2g} of that between images)',
                _AUGMENT,
            )
        )
    found.append(
        Diagnosis(
            f'the learning rate, base {optim.learning_rate:g}, may be too high for these images',
            f'--config.optim.learning_rate={optim.learning_rate / 4:g}',
        )
    )
    small = config.model.name in ('resnet18', 'resnet34') or config.model.width_multiplier < 1
    if small and data.images >= 100_000 and config.method.name in ('simsiam', 'byol'):
        found.append(
            Diagnosis(
                f'the network is small for {data.images} images (Li et al., 2022)',
                '--config.model.name=resnet50 --config.model.width_multiplier=1',
            )
        )
    return found
