"""Migration of configurations and checkpoints from earlier versions to this one."""

import json
from collections.abc import Mapping
from typing import Any

from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors, method_defaults
from simsiam_jax._version import __version__

# Format of stored configurations and checkpoints. Version 0.1.0 stored no format, which counts as
# 0. Every rename below increases the number.
FORMAT = 1

# Old key -> new key, for every key that was ever renamed or moved.
RENAMED_KEYS = {
    'labels': 'label_fraction',
    'augment.solarise': 'augment.solarize',
    'checkpoint.keep': 'checkpoint.max_to_keep',
    'checkpoint.keep_every': 'checkpoint.keep_period',
    'method.epsilon': 'method.sinkhorn_epsilon',
    'method.iterations': 'method.sinkhorn_iterations',
    'method.predictor_width': 'method.predictor_hidden_dim',
    'method.projector_width': 'method.projector_hidden_dim',
    'method.queue': 'method.queue_size',
    'optim.accumulate': 'optim.gradient_accumulation_steps',
    'optim.final': 'optim.final_lr_fraction',
    'optim.predictor': 'optim.predictor_schedule',
    'optim.warmup_start': 'optim.warmup_start_fraction',
    'second_view.solarise': 'second_view.solarize',
    'small_views.number': 'local_crops.number',
    'small_views.size': 'local_crops.size',
    'small_views.crop_scale': 'local_crops.crop_scale',
}

# Keys that stored configurations may lack, with the behavior of the versions that had none.
ADDED_KEYS = {'data.range': 'dtype', 'data.orientation': False, 'data.background': ()}

# Current key -> old value -> new value.
RENAMED_VALUES = {'data.on_device': {'colour': 'color'}}


def migrate(config: Any, *, origin: str = '', warn: bool = False) -> None:
    """Updates a configuration in place: renames old keys and adds missing ones.

    Args:
      config: Nested mapping, stored with a run or returned by a user's file.
      origin: Source of the configuration, for messages.
      warn: Print each renamed key once.

    Raises:
      UserError: The configuration has a newer format, an unknown task or an unknown key.
    """
    check_format(config, origin or 'the configuration')
    for key in {'format', 'version'} & set(config):
        del config[key]
    for old, new in rename(config):
        if warn:
            errors.warn_once(f'{old} is now {new}')
    task = config.get('task', 'pretrain')
    errors.check_choice('config.task', task, config_lib.DEFAULTS)
    known = config_lib.DEFAULTS[task]().to_dict()
    if task != 'pretrain' and 'model' in config:  # stored with a classifier: its encoder's
        known['model'] = config_lib.default().model.to_dict()
    name = config.get('method', {}).get('name')
    if name in method_defaults.METHODS:
        known['method'] = {'name': name, **method_defaults.METHODS[name]}
    elif name != 'simsiam':
        known.pop('method', None)
    _fill(config, known)
    config_keys.check(config, known)


def check_format(stored: Any, origin: str) -> None:
    """Checks that this version can read a configuration or the metadata of a checkpoint.

    Args:
      stored: Mapping with `format` and `version`, if it has them.
      origin: Source of the mapping, for messages.

    Raises:
      UserError: The format is newer.
    """
    number, version = stored.get('format', 0), stored.get('version', '')
    if number > FORMAT:
        raise errors.UserError(
            f'{origin} has format {number} of simsiam_jax {version}; simsiam_jax {__version__} '
            f'reads format {FORMAT} and older. Install simsiam_jax {version} or newer'
        )


def complete(config: Mapping[str, Any], *, origin: str = '') -> dict[str, Any]:
    """Returns a migrated copy of a stored configuration, with JSON's types."""
    plain = json.loads(json.dumps(config))
    for name, value in ADDED_KEYS.items():
        section, _, key = name.partition('.')
        plain.get(section, {}).setdefault(key, value)
    migrate(plain, origin=origin)
    # Stored evaluations have inherited all values: a key without one is newer than they are.
    newer = config_lib.default().data.to_dict()
    plain['data'] = {
        key: newer[key] if value is None else value for key, value in plain['data'].items()
    }
    return json.loads(json.dumps(plain))  # tuples of defaults become lists


def rename(config: Any) -> list[tuple[str, str]]:
    """Renames old keys and values in place and returns the renamed ones, (old, new)."""
    renamed = []
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.rpartition('.')
        new_section, _, new_key = new.rpartition('.')
        if section and section not in config:
            continue
        source = config[section] if section else config
        if key not in source:
            continue
        if new_section not in config and new_section:
            config[new_section] = {}
        (config[new_section] if new_section else config)[new_key] = source[key]
        del source[key]
        if not source:
            del config[section]
        renamed.append((f'config.{old}', f'config.{new}'))
    for key, values in RENAMED_VALUES.items():
        section, _, name = key.rpartition('.')
        value = config.get(section, {}).get(name)
        if value in values:
            config[section][name] = values[value]
            renamed.append((f'config.{key}={value}', f'config.{key}={values[value]}'))
    return renamed


def rename_array(name: str) -> str:
    """Returns this version's name of an array in a checkpoint of format 0."""
    renamed = {'memory': 'method_state', 'centres': 'centers'}
    return '/'.join(renamed.get(part, part) for part in name.split('/'))


def _fill(config: Any, known: dict[str, Any]) -> None:
    for key, value in known.items():
        if key not in config:
            config[key] = value
        elif isinstance(value, dict) and key != 'second_view':
            _fill(config[key], value)
