"""A configuration as a file that a person reads."""

import pathlib

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.tools.doctor.recommend import Advice

_FILE = '''"""{title}

Written by simsiam_jax.tools.doctor from {origin}. Not a setting of the paper.

    python -m simsiam_jax.main --config={path} --workdir=DIR

Look at DIR/views.png first. What no look at pixels tells: where a mirrored image is another thing
(digits, letters), set config.augment.flip = 0.0; where color or brightness is what tells images
apart, lower config.augment.jitter.
"""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
{lines}
    return config
'''


def write(path: str, given: ConfigDict, advice: list[Advice], origin: str) -> None:
    """Writes `given` with what is advised, each with its reason, as a file for --config.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    file = pathlib.Path(path)
    try:
        with file.open('x') as opened:
            opened.write(text(path, given, advice, origin))
    except FileExistsError as error:
        raise errors.UserError(f'{path} is there already; give another name to --write') from error
    except OSError as error:
        raise errors.UserError(f'{path} cannot be written: {error.strerror}') from error


def text(path: str, given: ConfigDict, advice: list[Advice], origin: str) -> str:
    """What `write` writes."""
    advised = {a.key for a in advice}
    default = flatten_dict(config_lib.default().to_dict(), sep='.')
    lines = [f'    # As in {origin}.']
    method = given.method.to_dict()
    if set(method) != set(config_lib.default().method):
        lines.append(f'    config.method = ConfigDict({method!r})')
        default |= {f'method.{key}': value for key, value in method.items()}
    for key, value in flatten_dict(given.to_dict(), sep='.').items():
        if key in advised or (key in default and value == default[key]):
            continue
        lines.append(f'    config.{key} = {value!r}')
    lines.append('\n    # What fits these images and this machine.')
    before = ''
    for a in advice:
        lines += [f'    # {a.reason}'] * (a.reason != before) + [
            f'    config.{a.key} = {a.value!r}'
        ]
        before = a.reason
    title = f'{given.method.name} on {given.data.source}.'
    return _FILE.format(title=title, origin=origin, path=path, lines='\n'.join(lines))
