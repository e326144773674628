"""Runs the task of a configuration: a training or an evaluation.

::

    python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR [--config.key=value ...]
"""

import os
import sys
from typing import Any

from absl import flags, logging

from simsiam_jax import command_line, errors, terminal
from simsiam_jax.runtime import determinism, distributed, launchers
from simsiam_jax.tasks import knn, memory, pretrain, probe, supervised
from simsiam_jax.training import mesh

TASKS = {
    'pretrain': pretrain.run,
    'linear': supervised.run,
    'finetune': supervised.run,
    'probe': probe.run,
    'knn': knn.run,
}


def run(arguments: command_line.Arguments) -> None:
    """Runs the task. Exits with 0, with 1 after a UserError, or with 143 after SIGTERM.

    Other failures may be transient and exit with os.EX_TEMPFAIL (75): launchers restart the run.
    """
    config, workdir = arguments.config, flags.FLAGS.workdir
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.FATAL)  # our own messages report a failed save in one line
    sys.unraisablehook = _ignore_closed_loop
    mesh.use_compilation_cache()
    try:
        cluster = command_line.cluster() or launchers.from_environment(os.environ)
        if config.get('deterministic'):
            determinism.enable(workdir, cluster.process_id if cluster else 0)
        distributed.start(cluster, timeout=flags.FLAGS.timeout)
        errors.check_choice('config.task', config.task, TASKS)
        with distributed.exit_together(), memory.oom_as_user_error(config):
            TASKS[config.task](config, workdir)
        if 'log' in config and config.log.report and not config.get('dry_run'):
            from simsiam_jax.pages import report  # imports scikit-learn

            report.write_report(workdir)
    except errors.TemporaryError as error:
        terminal.show(f'error: {error}', sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        distributed.report(error)
        sys.exit(os.EX_TEMPFAIL)


def _ignore_closed_loop(unraisable: Any) -> None:
    # After a failed save, tensorstore's threads still call the event loop that Orbax has closed.
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def main() -> None:
    command_line.define_path(
        'workdir', None, 'Folder for checkpoints and logs; gs://BUCKET/FOLDER.'
    )
    command_line.define_cluster_flags()
    command_line.start(run, 'workdir', config=True)


if __name__ == '__main__':
    main()
