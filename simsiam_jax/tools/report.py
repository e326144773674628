"""Writes a report on one run, or on several to compare, as one HTML page without external files.

::

    python -m simsiam_jax.tools.report DIR... [--out=report.html] [--images=SOURCE] [--noneighbors]

DIR is the workdir of a run of task pretrain, linear or finetune, which has finished, is running, or
was interrupted. The page opens with a verdict in words and the main values, or with a ranking of
several runs and the settings that differ. The curves of all runs share their charts. Augmented
views, nearest neighbors, a map of the features, configurations and versions follow. The neighbors
are computed on the CPU, because a run may be using the accelerator.
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
                'no run given; run python -m simsiam_jax.tools.report WORKDIR [WORKDIR ...]'
            )
        text = report.render_report(
            arguments.positional, neighbors=given.neighbors, images=given.images
        )
        out.write_text(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; run pip install {error.name}')
    except OSError as error:
        sys.exit(f'error: {out} cannot be written: {error.strerror}')
    print(f'{out}: open it in a browser')


def main() -> None:
    command_line.define_path('out', report.NAME, 'Page to write.')
    flags.DEFINE_string(
        'images', '', "Source of the images to show neighbors of; '' uses the images of the run."
    )
    flags.DEFINE_boolean('neighbors', True, 'Show the neighbors of some images.')
    flags.DEFINE_alias('neighbours', 'neighbors')
    command_line.start(run, positional=True)


if __name__ == '__main__':
    main()
