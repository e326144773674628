"""Checks of configuration keys, and errors for unknown keys."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors

# Sections with any keys: arguments of functions that a user may have written.
FREE_SECTIONS = ('model.arguments', 'optim.arguments')


def check(config: Any, known: Any = None) -> None:
    """Checks that the configuration has exactly the keys that its task reads.

    Skips `second_view`, which the constructor of recipes checks. Skips `method`, which the method's
    constructor checks, unless `known` has the keys of the same method.

    Args:
      config: Configuration of any task.
      known: Keys to check against; None uses the defaults of the task.

    Raises:
      UserError: A key is unknown or missing.
    """
    if known is None:
        errors.check_choice('config.task', config['task'], config_lib.DEFAULTS)
        known = config_lib.DEFAULTS[config['task']]()
    skipped = {'second_view'}
    if config.get('method', {}).get('name') != known.get('method', {}).get('name'):
        skipped.add('method')
    given, expected = keys(config), keys(known)
    for key in given:
        if key not in expected and key.partition('.')[0] not in skipped:
            raise unknown_key(key, expected)
    for key in expected:
        if key not in given and key.partition('.')[0] not in {*skipped, 'method'}:
            raise errors.UserError(f'key config.{key} is missing')


def keys(config: Any) -> list[str]:
    """Returns the names of all keys, as SECTION.KEY within sections."""
    names: list[str] = []
    for name, value in config.items():
        is_section = isinstance(value, (Mapping, ConfigDict))
        names += [f'{name}.{key}' for key in value] if is_section else [name]
    return names


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns the values of all keys by SECTION.KEY; the arguments of a function are one dict."""
    plain = config.to_dict()
    values = {}
    for key in keys(plain):
        section, _, name = key.rpartition('.')
        values[key] = plain[section][name] if section else plain[key]
    return values


def set_argument(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key of FREE_SECTIONS, such as model.arguments.depth, or such a section.

    Raises:
      UserError: A section is set to another value than a mapping.
    """
    if key in FREE_SECTIONS:
        if not isinstance(value, Mapping | ConfigDict):
            raise errors.UserError(f"config.{key} is {value!r}; expected a dict, {{'depth': 4}}")
        with config.unlocked():
            config[key.split('.')[0]].arguments = ConfigDict(dict(value))
        return
    section, _, name = key.rpartition('.')
    with config.unlocked():
        config[section.split('.')[0]].arguments[name] = value


def unknown_key(key: str, known: Collection[str]) -> errors.UserError:
    """Returns the error for an unknown key; it names a similar key, or the known ones."""
    section, _, name = key.rpartition('.')
    scores = {
        other: _similarity(name, other.rpartition('.')[2])
        + (0.1 if other.rpartition('.')[0] == section else 0)
        for other in known
    }
    best = max(scores, key=lambda other: scores[other])
    if scores[best] >= 0.6:
        return errors.UserError(f'unknown key config.{key}; did you mean config.{best}?')
    near = [other for other in known if other.rpartition('.')[0] == section]
    return errors.UserError(f'unknown key config.{key}; known: {", ".join(sorted(near or known))}')


def _similarity(given: str, known: str) -> float:
    """Returns a similarity from 0 to 1 (equal).

    Initials (lr for learning_rate) and shared words (image_size and size) count as similar.
    """
    words, known_words = given.split('_'), known.split('_')
    if len(known_words) > 1 and given == ''.join(word[0] for word in known_words):
        return 0.9
    if set(known_words) <= set(words) or set(words) <= set(known_words):
        return 0.8
    return difflib.SequenceMatcher(None, given, known).ratio()
