"""The methods that the paper compares SimSiam with: every key of config.method and its value."""

from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors

METHODS: dict[str, dict[str, Any]] = {  # methods/NAME.py documents the keys
    'simclr': {
        'dim': 128,
        'projector_hidden_dim': 2048,
        'projector_layers': 3,
        'projector_output_bn': True,
        'temperature': 0.1,
        'predictor': False,
        'predictor_hidden_dim': 512,
        'stop_gradient': False,
    },
    'moco_v2': {
        'dim': 128,
        'projector_hidden_dim': 2048,
        'temperature': 0.2,
        'momentum': 0.999,
        'queue_size': 65536,
        'bn_group': 32,
    },
    'byol': {
        'dim': 256,
        'projector_hidden_dim': 4096,
        'predictor_hidden_dim': 4096,
        'momentum': 0.99,
    },
    'swav': {
        'dim': 128,
        'projector_hidden_dim': 2048,
        'projector_layers': 3,
        'prototypes': 3000,
        'frozen_steps': 313,
        'temperature': 0.1,
        'sinkhorn_epsilon': 0.05,
        'sinkhorn_iterations': 3,
        'queue_size': 0,
        'queue_start': 0,
        'predictor': False,
        'predictor_hidden_dim': 512,
        'stop_gradient': True,
    },
}


# BYOL's reproductions: number of epochs from which one applies -> its values.
_BYOL_SCHEDULES = {
    0: {'optim.learning_rate': 0.45, 'optim.weight_decay': 1e-6, 'method.momentum': 0.99},
    200: {'optim.learning_rate': 0.3, 'optim.weight_decay': 1e-6, 'method.momentum': 0.99},
    800: {'optim.learning_rate': 0.2, 'optim.weight_decay': 1.5e-6, 'method.momentum': 0.996},
}


def byol_schedule(epochs: int) -> dict[str, float]:
    """Returns rate, weight decay and momentum of BYOL's reproduction on ImageNet by key.

    There are three: for 100 epochs, 200 to 400, or 800.
    """
    return _BYOL_SCHEDULES[max(start for start in _BYOL_SCHEDULES if start <= max(epochs, 0))]


def other_schedule(config: ConfigDict) -> str:
    """Returns a warning if the values are those for another number of epochs, otherwise ''.

    A configuration file sets the values by its own number of epochs; config.epochs may change it.
    """
    if config.method.name != 'byol':
        return ''
    expected = byol_schedule(config.epochs)
    values = {key: value for key, value in config_keys.flat(config).items() if key in expected}
    if values == expected or values not in _BYOL_SCHEDULES.values():
        return ''
    changed = {key: x for key, x in expected.items() if values[key] != x}
    given = ', '.join(f'{key}={values[key]:g}' for key in changed)
    flags = ' '.join(f'--config.{key}={x:g}' for key, x in changed.items())
    return (
        f'{given} is for another number of epochs than config.epochs={config.epochs}. '
        f'Set {flags}, or give the epochs as a word: --config=FILE.py:byol,{config.epochs}ep'
    )


def set_method(config: ConfigDict, name: str) -> None:
    """Sets config.method to the defaults of a method; 'simsiam' keeps it unchanged.

    Args:
      config: Configuration of task pretrain, changed in place.
      name: 'simsiam' or one of METHODS.

    Raises:
      UserError: The method is unknown.
    """
    if name == 'simsiam':
        return
    if name not in METHODS:
        raise errors.UserError(
            f'unknown method {name!r}; {errors.suggestion(name, ["simsiam", *METHODS])}'
        )
    config.method = ConfigDict({'name': name, **METHODS[name]})
    config.optim.predictor_schedule = 'decayed'  # only SimSiam keeps it constant


def set_small(config: ConfigDict, name: str) -> None:
    """Sets a network of three blocks, a method with narrow heads, and their rates.

    For small images on a CPU; tuned on scikit-learn's digits (benchmarks/RESULTS.md). Not from the
    paper.

    Args:
      config: Configuration of task pretrain, changed in place.
      name: 'simsiam' or one of METHODS.

    Raises:
      UserError: The method is unknown.
    """
    set_method(config, name)
    config.batch_size = 128
    config.augment.blur = 0.0
    config.model.name = 'resnet18'
    config.model.stem = 'cifar'
    config.model.width_multiplier = 0.25
    config.model.stages = (1, 1, 1)
    config.model.zero_init_residual = False  # a net this small learns better with active blocks
    config.model.dtype = 'float32'
    config.optim.learning_rate = {'simsiam': 0.8, 'simclr': 0.4, 'byol': 0.4}.get(name, 0.2)
    config.optim.weight_decay = 5e-4
    config.method.dim = 128
    config.method.update(
        {
            'simsiam': {'predictor_hidden_dim': 32},
            'simclr': {'projector_hidden_dim': 128, 'temperature': 0.2},
            'moco_v2': {
                'projector_hidden_dim': 128,
                'temperature': 0.1,
                'momentum': 0.99,
                'queue_size': 1024,
                'bn_group': 16,
            },
            'byol': {'projector_hidden_dim': 128, 'predictor_hidden_dim': 128, 'momentum': 0.97},
            'swav': {'projector_hidden_dim': 128, 'prototypes': 64, 'temperature': 0.2},
        }[name]
    )
