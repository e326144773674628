"""What will go wrong with a run, and what fits it, in under a minute before it starts.

python -m simsiam_jax.tools.doctor --config=configs/folder.py --config.data.source=folder:DIR \
    [--workdir=DIR] [--write=configs/mine.py] [--probe]

looks at the images, at the configuration and at this machine, trains nothing, and prints a line
for each thing it found, the worst first, then what to change in the configuration and why.
--write makes a configuration of that. --probe takes some hundred steps at several learning rates
and the best of them, in minutes. Ends with 0 where the run would start (with --write: the one
written), else 1.
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
            )
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    sys.exit(0 if starts else 1)


def main() -> None:
    flags.DEFINE_string('workdir', None, 'Workdir of the run, whose disk is checked.')
    flags.DEFINE_string('write', '', 'File to write the recommended configuration to.')
    flags.DEFINE_boolean('probe', False, 'Search for the learning rate by short trainings.')
    command_line.define_cluster_flags()
    command_line.start(run, config=True)


if __name__ == '__main__':
    main()
