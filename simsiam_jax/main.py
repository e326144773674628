"""Runs the task of a configuration.

python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR [--config.key=value ...]
"""

import logging
import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from simsiam_jax import errors

_CONFIG = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints and logs go.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}; overrides are --config.KEY=VALUE')
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import jax

    from simsiam_jax.tasks import pretrain

    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', str(cache / 'simsiam_jax'))
    logging.getLogger('absl').setLevel(logging.WARNING)
    tasks = {'pretrain': pretrain.run}
    try:
        errors.check_choice('config.task', _CONFIG.value.task, tasks)
        tasks[_CONFIG.value.task](_CONFIG.value, _WORKDIR.value)
    except errors.UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main)
