"""Runs the task of a configuration.

python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR [--config.key=value ...]
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from simsiam_jax import errors
from simsiam_jax.pages import report
from simsiam_jax.tasks import knn, memory, pretrain, probe, supervised
from simsiam_jax.runtime import distributed, launchers
from simsiam_jax.training import mesh

TASKS = {
    'pretrain': pretrain.run,
    'linear': supervised.run,
    'finetune': supervised.run,
    'probe': probe.run,
    'knn': knn.run,
}

# Ends of a run: 0, 1 for what the user must mend, 143 after SIGTERM, and this for all else, such as
# the death of a peer or a device: it may go well the next time. Launchers start again after all but
# 0 and 1, so many times and no more.
AGAIN = 75

CONFIG = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
_WORKDIR: Any = flags.DEFINE_string('workdir', None, 'Where checkpoints and logs go.')
_COORDINATOR: Any = flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0 of several; default: as the environment says.'
)
_NUM_PROCESSES: Any = flags.DEFINE_integer('num_processes', 1, 'With --coordinator.')
_PROCESS_ID: Any = flags.DEFINE_integer('process_id', 0, 'With --coordinator; from 0.')
_TIMEOUT: Any = flags.DEFINE_integer(
    'timeout', 300, 'Seconds after which a process that is missing or silent ends the run.'
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}; overrides are --config.KEY=VALUE')
    config, workdir = CONFIG.value, _WORKDIR.value
    logging.set_verbosity(logging.FATAL)  # what fails in a save is said in one line of ours
    sys.unraisablehook = _hook
    mesh.use_compilation_cache()
    try:
        distributed.start(peers(), timeout=_TIMEOUT.value)
        errors.check_choice('config.task', config.task, TASKS)
        with distributed.ending(AGAIN), memory.explained(config):
            TASKS[config.task](config, workdir)
        if 'log' in config and config.log.report and not config.get('dry_run'):
            report.at_end(workdir)
    except distributed.MissingError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(AGAIN)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        distributed.report(error)
        sys.exit(AGAIN)


def _hook(unraisable: Any) -> None:
    # Where a save fails, tensorstore's threads still call into the loop that Orbax has closed.
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def peers() -> launchers.Peers | None:
    """The processes that the flags name; None: as the environment says."""
    if not _COORDINATOR.value:
        return None
    return launchers.Peers(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


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
