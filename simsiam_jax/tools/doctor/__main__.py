"""Finds what would go wrong with a run, and what fits it, in under a minute and without training.

::

    python -m simsiam_jax.tools.doctor --config=configs/folder.py \\
        --config.data.source=folder:DIR [--workdir=DIR] [--write=configs/mine.py] [--probe]

Checks the images, the configuration and this machine, and prints a line for each finding, errors
first. Then it prints which keys of the configuration to change, and why. --write writes them as a
configuration, which is then the one checked. Keys given on the command line are kept; what would
be recommended for them is printed. --probe trains some hundred steps at each of several
learning rates and picks the best, in minutes. Exits with 0 if the run would start, otherwise 1.
"""

import sys

from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.runtime import distributed
from simsiam_jax.tools.doctor import examine
from simsiam_jax.training import mesh


def run(arguments: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.FATAL)
    mesh.use_compilation_cache()
    try:
        distributed.start(command_line.cluster())
        with distributed.exit_together():
            starts = examine.examine(
                arguments.config,
                given.workdir,
                write=given.write,
                probe=given.probe,
                origin=arguments.config_file,
                given=arguments.given(),
            )
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    sys.exit(0 if starts else 1)


def main() -> None:
    command_line.define_path('workdir', None, 'Workdir of the run, whose disk is checked.')
    command_line.define_path('write', '', 'File to write the recommended configuration to.')
    flags.DEFINE_boolean('probe', False, 'Search for the learning rate by short trainings.')
    command_line.define_cluster_flags()
    command_line.start(run, config=True)


if __name__ == '__main__':
    main()
