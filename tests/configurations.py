"""Loads configurations like the command line."""

import pathlib
import runpy

from ml_collections import ConfigDict

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
# Arguments of simsiam_jax.pretrain for runs that only train.
TRAIN_ONLY = {
    'guard': 'off',
    'eval.train': '',
    'eval.test': '',
    'log.tensorboard': False,
    'log.report': False,
    'log.every_steps': 1,
}


def load(name: str | pathlib.Path, **changes) -> ConfigDict:
    """Loads a configuration and changes keys.

    Args:
      name: Name in configs/, such as 'imagenet' or 'imagenet:byol', or a path.
      changes: Values by key; __ stands for a dot of the key.
    """
    file, _, variant = str(name).removesuffix('.py').partition(':')
    get_config = runpy.run_path(str(CONFIGS / f'{file}.py'))['get_config']
    config = get_config(variant) if variant else get_config()
    config.update_from_flattened_dict({key.replace('__', '.'): x for key, x in changes.items()})
    return config
