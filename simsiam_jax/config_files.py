"""Configuration files: finding, running and checking them."""

import contextlib
import inspect
import pathlib
import runpy
import traceback
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import errors, migration, paths


def load(spec: str) -> ConfigDict:
    """Loads a configuration of this or an earlier version from FILE.py[:VARIANT] or NAME[:VARIANT].

    Args:
      spec: A file, or the name of one in the installed folder `configs`, with its variant.

    Raises:
      UserError: The file does not exist, fails, or returns no valid configuration.
    """
    path, _, variant = paths.expand(spec).partition(':')
    path = find(path)
    get_config = run(path).get('get_config')
    if get_config is None:
        raise errors.UserError(f'config file {path} has no get_config(); add it')
    with file_errors(path, spec):
        if variant and not inspect.signature(get_config).parameters:
            raise errors.UserError(
                f'config file {path} has no variants; got {variant!r}. Remove it, and set keys by '
                '--config.KEY=VALUE'
            )
        config = get_config(*([variant] if variant else []))
    if not isinstance(config, ConfigDict):
        raise errors.UserError(
            f'config file {spec} returned {type(config).__name__}; expected a ConfigDict'
        )
    with config.unlocked():
        migration.migrate(config, origin=spec, warn=True)
    return config


def names() -> list[str]:
    """Returns the names of the installed configurations."""
    return sorted(path.stem for path in paths.installed('configs').glob('*.py'))


def find(path: str) -> str:
    """Returns the path of a configuration: the file itself, or else the installed one of its name.

    Args:
      path: FILE.py, NAME or configs/NAME.py.

    Raises:
      UserError: There is no such file.
    """
    if pathlib.Path(path).is_file():
        return path
    name = path.removeprefix('configs/').removesuffix('.py')
    if name not in names():
        raise errors.UserError(
            f'config file {path} does not exist; pass --config=FILE.py, or one of '
            f'{", ".join(names())}'
        )
    return str(paths.installed('configs') / f'{name}.py')


def run(path: str) -> dict[str, Any]:
    """Returns what a configuration's file defines, by name.

    Raises:
      UserError: The file fails.
    """
    with file_errors(path, path):
        return runpy.run_path(path)


@contextlib.contextmanager
def file_errors(path: str, spec: str) -> Iterator[None]:
    """Turns errors of a configuration's file within this context into UserErrors with the line.

    Args:
      path: The file.
      spec: The file with its variant, for the message.
    """
    try:
        yield
    except errors.UserError:
        raise
    except (Exception, SystemExit) as error:  # any type: the file is a program of the user
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f' in line {line}' if line else ''
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise errors.UserError(
            f'config file {spec} failed{where}: {reason}. Fix the file or its arguments'
        ) from error
