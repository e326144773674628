"""Draws the report of one run, or of several to compare: a page that needs no network.

python -m simsiam_jax.tools.report DIR... [--out=report.html] [--images=SOURCE] [--noneighbors]

DIR is the workdir of a run of task pretrain, linear or finetune: one that has ended, is still
running, or was broken off. The page has their curves over each other, final figures, augmented
views, the nearest neighbors of some images, configurations with what differs marked, and versions.
The neighbors are computed on the CPU, for a run may be using the accelerator.
"""

import pathlib
import sys

import jax
from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.pages import report
from simsiam_jax.training import mesh


def run(arguments: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')
    mesh.use_compilation_cache()
    out = pathlib.Path(given.out)
    try:
        if not arguments.positional:
            raise errors.UserError(
                'no run is given; python -m simsiam_jax.tools.report WORKDIR [WORKDIR ...]'
            )
        text = report.render_report(
            arguments.positional, neighbors=given.neighbors, images=given.images
        )
        out.write_text(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; pip install {error.name}')
    except OSError as error:
        sys.exit(f'error: {out} cannot be written: {error.strerror}')
    print(f'{out}: open it in a browser')


def main() -> None:
    flags.DEFINE_string('out', report.NAME, 'Page to write.')
    flags.DEFINE_string('images', '', "Images to show neighbors of; '' uses those of the run.")
    flags.DEFINE_boolean('neighbors', True, 'Show the neighbors of some images.')
    flags.DEFINE_alias('neighbours', 'neighbors')
    command_line.start(run, positional=True)


if __name__ == '__main__':
    main()
