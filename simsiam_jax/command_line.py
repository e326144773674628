"""The command line of every command: flags, a configuration with overrides, one-line errors."""

import dataclasses
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from simsiam_jax import config_keys, errors, migration
from simsiam_jax.runtime.launchers import ClusterSpec


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line gives beside plain flags.

    Attributes:
      positional: Arguments without --.
      config: Configuration with its overrides; None for commands without one.
      config_file: Value of --config.
    """

    positional: list[str]
    config: Any = None
    config_file: str = ''


def start(
    run: Callable[[Arguments], None],
    *required: str,
    config: bool = False,
    positional: bool = False,
) -> None:
    """Parses the command line and calls `run`; invalid arguments exit with a one-line error.

    Plain flags are defined by the caller, with absl, and read from flags.FLAGS.

    Args:
      run: Receives what is not a plain flag.
      required: Names of flags that must be given.
      config: Read a configuration from --config=FILE.py[:VARIANT] and --config.KEY=VALUE.
      positional: Accept arguments without --.
    """
    given = Arguments([])

    def parse(argv: list[str]) -> list[str]:
        nonlocal given
        try:
            flags.mark_flags_as_required(required)
            file = ''
            if config:
                file, argv = _load(argv)
            rest = flags.FLAGS(argv)
            if len(rest) > 1 and not positional:
                raise errors.UserError(f'unexpected argument {rest[1]!r}; expected --NAME=VALUE')
        except (flags.Error, errors.UserError) as error:
            sys.exit(f'error: {" ".join(str(error).split())}')
        given = Arguments(rest[1:], flags.FLAGS.config if config else None, file)
        return rest

    app.run(lambda _: run(given), flags_parser=parse)


def _load(argv: list[str]) -> tuple[str, list[str]]:
    """Loads the file of --config and defines a flag for each override in argv.

    Returns the file, and argv without --config and with today's names of renamed keys.
    """
    rest, file = [], ''
    tokens = iter(argv)
    for token in tokens:
        if token in ('--config', '-config'):
            file = next(tokens, '')
        elif match := re.fullmatch(r'--?config=(.*)', token):
            file = match[1]
        else:
            rest.append(token)
    if not file:
        flags.DEFINE_string('config', None, 'FILE.py[:VARIANT]; --config.KEY=VALUE sets a key.')
        if not any(token.startswith(('--help', '-help')) for token in argv):
            raise errors.UserError('--config is missing; pass a file such as configs/imagenet.py')
        return '', argv
    config = load_config(file)
    rest = [rest[0], *(_renamed(token, config) for token in rest[1:])]
    config_flags.DEFINE_config_dict('config', config, sys_argv=rest)
    return file, rest


def load_config(spec: str) -> ConfigDict:
    """Loads a configuration of this or an earlier version from FILE.py[:VARIANT].

    Raises:
      UserError: The file does not exist, fails, or returns no valid configuration.
    """
    path, _, variant = spec.partition(':')
    if not pathlib.Path(path).is_file():
        raise errors.UserError(f'config file {path} does not exist; pass --config=FILE.py')
    try:
        get_config = runpy.run_path(path)['get_config']
        config = get_config(*([variant] if variant else []))
    except errors.UserError:
        raise
    except Exception as error:  # anything: the file is a program of the user's
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f'line {x.lineno}' for x in frames[::-1] if x.filename == path), 'the file')
        raise errors.UserError(
            f'config file {spec} failed in {line}: {type(error).__name__}: {errors.reason(error)}'
        ) from error
    if not isinstance(config, ConfigDict):
        raise errors.UserError(
            f'config file {spec} returned {type(config).__name__}; expected a ConfigDict'
        )
    with config.unlocked():
        migration.migrate(config, origin=spec, warn=True)
    return config


def _renamed(token: str, config: ConfigDict) -> str:
    """Returns an argument with today's name of its key, which must be one of the configuration."""
    match = re.fullmatch(r'(--?(?:no)?config\.)([^=]+)(=.*)?', token, re.DOTALL)
    if not match:
        return token
    flag, key, value = match[1], match[2], match[3] or ''
    if new := migration.RENAMED_KEYS.get(key):
        errors.warn_once(f'config.{key} is now config.{new}')
        key = new
    if new := migration.RENAMED_VALUES.get(key, {}).get(value[1:]):
        errors.warn_once(f'config.{key}{value} is now config.{key}={new}')
        value = f'={new}'
    section, _, name = key.rpartition('.')
    if section == 'second_view' and name in config.augment:
        config.second_view = {name: config.augment[name], **config.second_view}  # its type
    known = config_keys.keys(config)
    if key not in known and key not in config:
        raise config_keys.unknown_key(key, known)
    return f'{flag}{key}{value}'


def define_cluster_flags() -> None:
    """Defines the flags by which the processes of a run find each other."""
    flags.DEFINE_string(
        'coordinator', '', "HOST:PORT of process 0; '' reads the variables of the launcher."
    )
    flags.DEFINE_integer('num_processes', 1, 'Number of processes, with --coordinator.')
    flags.DEFINE_integer('process_id', 0, 'Number of this process from 0, with --coordinator.')
    flags.DEFINE_integer(
        'timeout', 300, 'Seconds after which a missing or silent process stops the run.'
    )


def cluster() -> ClusterSpec | None:
    """Returns the processes that the flags name; None reads the variables of the launcher."""
    given = flags.FLAGS
    if not given.coordinator:
        return None
    return ClusterSpec(given.coordinator, given.num_processes, given.process_id)
