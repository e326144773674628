"""Writes a configuration as a readable Python file."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TextIO

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors, paths
from simsiam_jax.tools.doctor.recommend import Advice

_FILE = '''"""{title}

Written by simsiam_jax.tools.doctor from {origin}; not a setting of the paper.

    python -m simsiam_jax.main --config={path} --workdir=DIR

Words after a colon (a method, 200ep, folder:DIR) change the method, the epochs and the images.
Check DIR/views.png first. The pixels alone do not show which augmentations keep the meaning:
  - If a mirrored image means something else (digits, letters), set config.augment.flip = 0.0.
  - If color or brightness distinguishes the images, lower config.augment.jitter.
"""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import variants


def get_config(variant: str = '') -> ConfigDict:
    config = config_lib.default()
{lines}
    variants.apply(config, variant, {path!r})
    return config
'''


def check(path: str) -> None:
    """Raises UserError if no file can be made at `path`, or if there is one."""
    with _create(path):
        pass
    pathlib.Path(path).unlink()


def write(path: str, given: ConfigDict, advice: list[Advice], origin: str) -> None:
    """Writes a configuration that follows the advice, with the reasons, as a file for --config.

    Args:
      path: File to write.
      given: Configuration to start from.
      advice: Keys to change.
      origin: Name of the configuration to start from.

    Raises:
      UserError: The file exists or cannot be written.
    """
    with _create(path) as file:
        file.write(text(path, given, advice, origin))


@contextlib.contextmanager
def _create(path: str) -> Iterator[TextIO]:
    try:
        with pathlib.Path(path).open('x') as file:
            yield file
    except FileExistsError as error:
        raise errors.UserError(f'{path} exists; pass another name to --write') from error
    except OSError as error:
        raise errors.UserError(f'{path} cannot be written: {error.strerror}') from error


def text(path: str, given: ConfigDict, advice: list[Advice], origin: str) -> str:
    """Returns the content of the file; the arguments are those of `write`."""
    advised = {a.key for a in advice}
    default = config_keys.flat(config_lib.default())
    lines = [f'    # From {origin}.']
    method = given.method.to_dict()
    if set(method) != set(config_lib.default().method):
        lines.append(f'    config.method = ConfigDict({method!r})')
        default |= {f'method.{key}': value for key, value in method.items()}
    for key, value in config_keys.flat(given).items():
        if key in advised or (key in default and value == default[key]):
            continue
        lines.append(f'    config.{key} = {value!r}')
    lines.append('\n    # Recommended for these images and this machine.')
    previous = ''
    for a in advice:
        lines += [f'    # {a.reason}'] * (a.reason != previous) + [
            f'    config.{a.key} = {a.value!r}'
        ]
        previous = a.reason
    title = f'{given.method.name} on {given.data.source}.'
    filled = _FILE.format(title=title, origin=origin, path=path, lines='\n'.join(lines))
    return paths.printable(filled)
