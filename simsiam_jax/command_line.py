"""Command-line parsing for all commands: flags, configuration overrides, one-line errors."""

import ast
import dataclasses
import io
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from simsiam_jax import config_files, config_keys, errors, migration, paths, terminal
from simsiam_jax.runtime.launchers import ClusterSpec


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The parts of a command line besides plain flags.

    Attributes:
      positional: Arguments without --.
      config: Configuration with its overrides; None for commands without one.
      config_file: Value of --config.
      overrides: Keys that --config.KEY=VALUE sets.
    """

    positional: list[str]
    config: Any = None
    config_file: str = ''
    overrides: frozenset[str] = frozenset()

    def given(self) -> frozenset[str]:
        """Returns the keys that the command line sets: overrides, and what the variant changes."""
        path, _, variant = self.config_file.partition(':')
        if not variant:
            return self.overrides
        try:
            plain, chosen = (
                config_keys.flat(config_files.load(f)) for f in (path, self.config_file)
            )
        except errors.UserError:  # a file that cannot do without a variant
            return self.overrides
        changed = {key for key, value in chosen.items() if plain.get(key) != value}
        return self.overrides | changed


def start(
    run: Callable[[Arguments], None],
    *required: str,
    config: bool = False,
    positional: bool = False,
) -> None:
    """Parses the command line and calls `run`; invalid arguments exit with a one-line error.

    The caller defines plain flags with absl and reads them from flags.FLAGS.

    Args:
      run: Function to call; receives the arguments that are not plain flags.
      required: Names of flags that must be given.
      config: Read a configuration from --config=FILE[:VARIANT] and --config.KEY=VALUE.
      positional: Accept arguments without --.
    """
    arguments = Arguments([])

    def parse(argv: list[str]) -> list[str]:
        nonlocal arguments
        for flag in flags.FLAGS.get_flags_for_module(__name__):  # --help shows them too
            flags.FLAGS.register_key_flag_for_module(argv[0], flag)
        if argv[1:2] == ['--']:  # other launchers put it before the flags of the program
            argv = [argv[0], *argv[2:]]
        try:
            flags.mark_flags_as_required(required)
            file = ''
            if config:
                file, argv = _load(argv)
            rest = flags.FLAGS(argv)
            if len(rest) > 1 and not positional:
                raise errors.UserError(f'unexpected argument {rest[1]!r}; expected --NAME=VALUE')
        except (flags.Error, errors.UserError) as error:
            sys.exit(f'error: {_readable(" ".join(str(error).split()))}')
        overrides = (re.match(r'--?(?:no)?config\.([^=]+)', token) for token in argv)
        keys = frozenset(match[1] for match in overrides if match)
        arguments = Arguments(rest[1:], flags.FLAGS.config if config else None, file, keys)
        return rest

    if isinstance(sys.stdout, io.TextIOWrapper):  # any name can be printed, as on stderr
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        app.run(lambda _: run(arguments), flags_parser=parse)
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        terminal.show(stop.code, sys.stderr)
        sys.exit(1)


def _readable(message: str) -> str:
    """Returns absl's message about a value that has not the flag's type, as what was expected."""
    match = re.fullmatch(r'flag (--?\S+?)=(.*?): (.*)', message)
    for reason, expected in _TYPES.items():
        if match and match[3].startswith(reason):
            return f'{match[1]} is {match[2]!r}; expected {expected}'
    return message


_TYPES = {
    'invalid literal for int()': 'a whole number, such as 256',
    'could not convert string to float': 'a number, such as 0.05',
    "('Non-boolean argument": 'True or False',
}


def _load(argv: list[str]) -> tuple[str, list[str]]:
    """Loads the file of --config and defines a flag for each override in argv.

    Returns:
      The file, and argv without --config and with the current names of renamed keys.
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
        flags.DEFINE_string('config', None, 'FILE[:VARIANT]; --config.KEY=VALUE sets a key.')
        if not any(token.startswith(('--help', '-help')) for token in argv):
            raise errors.UserError(
                f'--config is missing; pass a file, or one of {", ".join(config_files.names())}'
            )
        return '', argv
    config = config_files.load(file)
    rest = [rest[0], *(rename_override(token, config) for token in rest[1:])]
    config_flags.DEFINE_config_dict('config', config, sys_argv=rest)
    return file, rest


def rename_override(token: str, config: ConfigDict) -> str:
    """Returns an argument with the current name of its key.

    Raises:
      UserError: The configuration has no such key, or a word is given for numbers.
    """
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
        config.second_view = {name: config.augment[name], **config.second_view}  # fixes its type
    if section in config_keys.FREE_SECTIONS:
        if name not in config[section.split('.')[0]].arguments:
            config_keys.set_argument(config, key, _literal(value[1:]))  # fixes its type
        return f'{flag}{key}{value}'
    known = config_keys.keys(config)
    if key not in known and key not in config:
        raise config_keys.unknown_key(key, known)
    if value:
        _check_numbers(key, value[1:], config)
    return f'{flag}{key}{value}'


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a word
        return value


def _check_numbers(key: str, value: str, config: ConfigDict) -> None:
    # config_flags accepts words in place of a tuple's numbers.
    default = config_keys.flat(config).get(key)
    if not default or not isinstance(default, tuple):
        return
    items = [item for item in value.strip('()[] ').split(',') if item.strip()]
    if all(map(_is_number, default)) and not (value and all(map(_is_number, items))):
        raise errors.UserError(
            f'--config.{key} is {value!r}; expected numbers separated by commas, such as '
            f'{",".join(map(str, default))}, or () for none'
        )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class _PathParser(flags.ArgumentParser[str]):
    """Parses a path, in which ~ is the home folder."""

    syntactic_help = 'a path'

    def flag_type(self) -> str:
        return 'path'

    def parse(self, argument: str) -> str:
        return paths.expand(argument)


def define_path(name: str, default: str | None, help: str) -> None:
    """Defines a flag that takes the path of a file or folder."""
    flags.DEFINE(_PathParser(), name, default, help)


def define_cluster_flags() -> None:
    """Defines the flags that connect the processes of a run."""
    flags.DEFINE_string(
        'coordinator', '', "HOST:PORT of process 0; '' reads the launcher's variables."
    )
    flags.DEFINE_integer('num_processes', 1, 'Number of processes, with --coordinator.')
    flags.DEFINE_integer('process_id', 0, 'Id of this process, from 0, with --coordinator.')
    flags.DEFINE_integer(
        'timeout', 300, 'Seconds after which a missing or silent process stops the run.'
    )


def cluster() -> ClusterSpec | None:
    """Returns the processes that the flags specify; None if --coordinator is not set."""
    values = flags.FLAGS
    if not values.coordinator:
        return None
    return ClusterSpec(values.coordinator, values.num_processes, values.process_id)
