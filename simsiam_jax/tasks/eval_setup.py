"""What every evaluation starts from: a checkpoint, and a labeled pair of image sets."""

import dataclasses
import json
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import subset, tfds_source
from simsiam_jax.runtime import storage
from simsiam_jax.tasks import inputs
from simsiam_jax.tasks.features import Extractor
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import mesh as mesh_lib

# Keys that are as the checkpoint was trained, where they are not given.
_INHERITED = (
    'data.channels',
    'data.tfds_data_dir',
    'augment.size',
    'augment.mean',
    'augment.std',
    'eval.resize',
    'eval.train',
    'eval.test',
)


@dataclasses.dataclass(frozen=True)
class EvalSetup:
    """A checkpoint and the images to judge it on.

    Attributes:
      config: complete.
    """

    config: ConfigDict
    encoder: encoder_lib.Encoder
    train: ImageSet
    test: ImageSet
    mesh: Mesh

    def extractor(self, batch_size: int) -> Extractor:
        return Extractor(
            self.mesh,
            channels=self.config.data.channels,
            size=self.config.augment.size,
            resize=self.config.eval.resize,
            batch_size=batch_size,
        )

    def announce(self, what: str) -> None:
        say(
            f'{what} of {self.config.init_from}: {len(self.train)} images of '
            f'{self.config.eval.train} to learn from, {len(self.test)} of '
            f'{self.config.eval.test} to be tested on, {self.mesh.size} x '
            f'{jax.devices()[0].device_kind}'
        )


def prepare(config: ConfigDict, mesh: Mesh | None = None) -> EvalSetup:
    """Opens the checkpoint and the images; the keys of `config` that are None are filled in.

    Raises:
      UserError: a key is unknown, the checkpoint is none, or the images do not fit it.
    """
    config_keys.check(config)
    mesh = mesh or mesh_lib.make_mesh()
    if not config.init_from:
        raise errors.UserError(
            'config.init_from is not given; expected the workdir of a pre-training run or a file '
            'of weights: --config.init_from=DIR'
        )
    encoder = encoder_lib.open_encoder(config.init_from)
    trained = ConfigDict(encoder.config)
    if config.data.channels not in (None, trained.data.channels):
        raise errors.UserError(
            f'config.data.channels is {config.data.channels}, but {config.init_from} takes images '
            f'of {trained.data.channels}; leave the key away'
        )
    for key in _INHERITED:
        section, name = key.split('.')
        if config[section][name] is None:
            value = trained[section][name]
            config[section][name] = tuple(value) if name in ('mean', 'std') else value
    for key in ('train', 'test'):
        if not config.eval[key]:
            raise errors.UserError(
                f'config.eval.{key} is not given and {config.init_from} was trained without; give '
                f'labeled images: --config.eval.{key}=folder:DIR with one subfolder a class'
            )
    train = _training_set(config)
    test = inputs.open_source(config.eval.test, config.data)
    check_classes(train, test)
    return EvalSetup(config, encoder, train, test, mesh)


def _training_set(config: ConfigDict) -> ImageSet:
    """Returns config.eval.train, or its class-balanced share config.label_fraction.

    The share is the same every time. 1 % and 10 % of ImageNet are TFDS's imagenet2012_subset, the
    field's own, if it is prepared.
    """
    name = {0.01: '1pct', 0.1: '10pct'}.get(config.label_fraction)
    spec = f'imagenet2012_subset/{name}/train'
    if (
        name
        and config.eval.train == 'tfds:imagenet2012/train'
        and tfds_source.is_prepared(spec, config.data.tfds_data_dir)
    ):
        say(f'the images with labels are tfds:{spec}')
        return inputs.open_source(f'tfds:{spec}', config.data)
    source = inputs.open_source(config.eval.train, config.data)
    if config.label_fraction == 1 or not source.classes:
        return source
    kept, _ = subset.split(subset.labels(source), config.label_fraction, config.seed)
    return subset.take(source, kept)


def check_classes(train: ImageSet, test: ImageSet) -> None:
    """Raises UserError where one has no labels, or the two have other classes."""
    for key, source in (('train', train), ('test', test)):
        if not source.classes:
            raise errors.UserError(
                f'config.eval.{key} has no labels, which this needs; give a folder with one '
                'subfolder a class'
            )
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise errors.UserError(
            f'config.eval.train has {len(train.classes)} classes and config.eval.test '
            f'{len(test.classes)}; both need the same, and {", ".join(differing[:3])} '
            f'{"is" if len(differing) == 1 else "are"} in one only'
        )


def write(workdir: str, name: str, result: Any) -> None:
    """The result as JSON in the workdir, which is made where it is not there.

    Raises:
      UserError: it cannot be written.
    """
    folder = storage.folder(workdir)
    if jax.process_index():
        return
    try:
        storage.mkdirs(folder)
        (folder / name).write_text(json.dumps(result, indent=2) + '\n')
    except storage.io_errors() as error:
        raise errors.UserError(
            f'{folder / name} cannot be written: {storage.reason(error)}; '
            + storage.write_hint(workdir)
        ) from error
    say(f'written to {folder / name}')
