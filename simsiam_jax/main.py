"""Runs the task of a configuration.

python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR [--config.key=value ...]
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from simsiam_jax import errors
from simsiam_jax.tasks import knn, pretrain, probe, supervised
from simsiam_jax.training import mesh

TASKS = {
    'pretrain': pretrain.run,
    'linear': supervised.run,
    'finetune': supervised.run,
    'probe': probe.run,
    'knn': knn.run,
}

CONFIG = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
_WORKDIR: Any = flags.DEFINE_string('workdir', None, 'Where checkpoints and logs go.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}; overrides are --config.KEY=VALUE')
    config, workdir = CONFIG.value, _WORKDIR.value
    logging.set_verbosity(logging.WARNING)
    mesh.use_compilation_cache()
    try:
        errors.check_choice('config.task', config.task, TASKS)
        TASKS[config.task](config, workdir)
    except errors.UserError as error:
        sys.exit(f'error: {error}')


def parse(argv: list[str], required: Sequence[str] = ('config', 'workdir')) -> list[str]:
    """What is left of the command line; wrong flags end the process with one line."""
    flags.mark_flags_as_required(required)
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value.task  # a file that cannot be loaded is only told of when it is used
    # An unknown key is an AttributeError or KeyError of the configuration's own library.
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        text = str(error).rpartition('UserError: ')[2].replace('\\n', ' ').replace("\\'", "'")
        sys.exit(f'error: {" ".join(text.split())}')
    return rest


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
