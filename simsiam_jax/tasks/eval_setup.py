"""The inputs of every evaluation: a checkpoint and two labeled image sets."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors, patience
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import overlap, subset, tfds_source
from simsiam_jax.models import backbones
from simsiam_jax.runtime import storage
from simsiam_jax.tasks import inputs
from simsiam_jax.tasks.features import CropLoader, Encode, make_encode
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class EvalSetup:
    """A checkpoint and the labeled images to evaluate it on.

    Attributes:
      config: Configuration of the evaluation, with inherited keys filled in.
      encoder: Trained backbone and its variables.
      encode: The backbone with its normalization, for extract_features.
      train: Images to learn from, or the bank of kNN.
      test: Images to test on.
      mesh: All devices.
    """

    config: ConfigDict
    encoder: encoder_lib.LoadedEncoder
    encode: Encode
    train: ImageSet
    test: ImageSet
    mesh: Mesh

    def loader(self) -> CropLoader:
        """Returns a loader of center crops, config.eval.batch_size per batch."""
        return CropLoader(
            self.mesh,
            channels=self.config.data.channels,
            size=self.config.augment.size,
            resize=self.config.eval.resize,
            batch_size=self.config.eval.batch_size,
        )

    def random_variables(self) -> dict[str, Any]:
        """Returns fresh variables of the backbone: the baseline without training."""
        config = self.config
        images = np.zeros((1, config.augment.size, config.augment.size, config.data.channels))
        init = jax.jit(functools.partial(backbones.init, self.encoder.module))
        return init(jax.random.key(config.seed), images.astype(np.float32))

    def announce(self, task: str) -> None:
        """Prints what is evaluated, on which images and devices."""
        config = self.config
        say(
            f'{task} of {config.init_from}: {len(self.train)} training images of '
            f'{config.eval.train}, {len(self.test)} test images of {config.eval.test}, '
            f'{self.mesh.size} x {jax.devices()[0].device_kind}'
        )


def prepare(
    config: ConfigDict, mesh: Mesh | None = None, encoder: encoder_lib.LoadedEncoder | None = None
) -> EvalSetup:
    """Opens the checkpoint and the images, and fills in the keys of `config` that are None.

    Args:
      config: Configuration of the evaluation, changed in place.
      mesh: Devices to use; None uses all.
      encoder: Encoder to evaluate; None loads config.init_from.

    Raises:
      UserError: A key is unknown, there is no checkpoint, or the images do not fit it.
    """
    config_keys.check(config)
    mesh = mesh or mesh_lib.make_mesh()
    if not config.init_from:
        raise errors.UserError(
            'config.init_from is not set; expected the workdir of a pre-training run or a weight '
            'file. Set --config.init_from=DIR'
        )
    encoder = encoder or encoder_lib.open_encoder(config.init_from)
    trained = ConfigDict(encoder.config)
    if config.data.channels not in (None, trained.data.channels):
        raise errors.UserError(
            f'config.data.channels is {config.data.channels}, but {config.init_from} was trained '
            f'with {trained.data.channels}. Remove the key'
        )
    if config.eval.split and config.eval.train is None and trained.eval.split:
        if config.eval.split != trained.eval.split:
            raise errors.UserError(
                f'config.eval.split is {config.eval.split}, but {config.init_from} was trained '
                f'with {trained.eval.split}: another would test on its training images. Remove '
                'the key'
            )
    elif config.eval.split:
        config.eval.test = config.eval.test or ''
    for section in ('data', 'augment', 'eval'):
        for name in [name for name, value in config[section].items() if value is None]:
            value = trained[section][name]  # see config.inherited
            config[section][name] = tuple(value) if isinstance(value, list) else value
    inputs.resolve(config, trained.data.source)
    if config.eval.test and config.eval.test.endswith(f'/test:{trained.data.source}'):
        say(
            f'the test images are a part of {trained.data.source}, which pre-training saw unlabeled'
        )
    for key in ('train', 'test'):
        if not config.eval[key]:
            raise errors.UserError(
                f'config.eval.{key} is empty, here and in the training of {config.init_from}. Set '
                f'labeled images: --config.eval.{key}=folder:DIR with one subfolder per class, or '
                'hold out a part of one folder: --config.eval.train=folder:DIR '
                '--config.eval.split=0.2'
            )
    train = _training_set(config)
    test = inputs.open_source(config.eval.test, config.data)
    check_classes(train, test)
    encode = make_encode(encoder.module, config.augment.mean, config.augment.std)
    return EvalSetup(config, encoder, encode, train, test, mesh)


def _training_set(config: ConfigDict) -> ImageSet:
    """Returns config.eval.train, or its class-balanced share config.label_fraction.

    The share is the same in every run. For 1% and 10% of ImageNet, uses TFDS's
    imagenet2012_subset, the standard choice, if it is prepared.
    """
    name = {0.01: '1pct', 0.1: '10pct'}.get(config.label_fraction)
    spec = f'imagenet2012_subset/{name}/train'
    if (
        name
        and config.eval.train == 'tfds:imagenet2012/train'
        and tfds_source.is_prepared(spec, config.data.tfds_data_dir)
    ):
        say(f'using the labeled images of tfds:{spec}')
        return inputs.open_source(f'tfds:{spec}', config.data)
    source = inputs.open_source(config.eval.train, config.data)
    if config.label_fraction == 1 or not source.classes:
        return source
    labeled, _ = subset.split(subset.labels(source), config.label_fraction, config.seed)
    return subset.take(source, labeled)


def check_classes(train: ImageSet, test: ImageSet) -> None:
    """Raises UserError if a set has no labels or the two have different classes.

    Prints a warning if the two share images.
    """
    for key, source in (('train', train), ('test', test)):
        if not source.classes:
            raise errors.UserError(
                f'config.eval.{key} has no labels; expected labeled images. Set a folder with one '
                'subfolder per class, and at least two classes'
            )
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise errors.UserError(
            f'config.eval.train has {len(train.classes)} classes and config.eval.test '
            f'{len(test.classes)}; expected the same classes, but {", ".join(differing[:3])} '
            f'{"is" if len(differing) == 1 else "are"} only in one'
        )
    shared = [] if jax.process_index() else overlap.shared_images(train, test)
    if shared:
        errors.warn_once(
            f'{len(shared):,} of {len(test):,} test images are also in config.eval.train '
            f'({", ".join(shared[:2])}): the accuracy is too high. Remove them from one of the sets'
        )


def write(workdir: str, name: str, result: Any) -> None:
    """Writes WORKDIR/name as JSON, and creates the workdir if it is missing.

    Args:
      workdir: Folder of the run.
      name: Name of the file.
      result: JSON-compatible value.

    Raises:
      UserError: The file cannot be written.
    """
    folder = storage.folder(workdir)
    if jax.process_index():
        return

    def write() -> None:
        storage.mkdirs(folder)
        (folder / name).write_text(json.dumps(result, indent=2) + '\n')

    try:
        patience.call(write, f'the workdir {folder}')
    except patience.io_errors() as error:
        raise errors.UserError(
            f'{folder / name} cannot be written: {storage.reason(error)}; '
            + storage.write_hint(workdir)
        ) from error
    say(f'wrote {folder / name}')
