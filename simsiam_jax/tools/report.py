"""Draws the report of one run, or of several to compare: a page that needs no network.

python -m simsiam_jax.tools.report DIR... [--out=report.html] [--images=SOURCE] [--noneighbours]

DIR is the workdir of a run of task pretrain, linear or finetune: one that has ended, is still
running, or was broken off. The page has their curves over each other, final figures, augmented
views, the nearest neighbours of some images, configurations with what differs marked, and versions.
The neighbours are computed on the CPU, for a run may be using the accelerator.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import app, flags, logging

from simsiam_jax import errors
from simsiam_jax.pages import report
from simsiam_jax.tools import arguments
from simsiam_jax.training import mesh

_OUT: Any = flags.DEFINE_string('out', report.NAME, 'The page to write.')
_IMAGES: Any = flags.DEFINE_string('images', '', 'Whose neighbours to show; default: the run says.')
_NEIGHBOURS: Any = flags.DEFINE_boolean('neighbours', True, 'Whether to show neighbours at all.')


def run(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')
    mesh.use_compilation_cache()
    out = pathlib.Path(_OUT.value)
    try:
        if len(argv) < 2:
            raise errors.UserError(
                'no run is given; python -m simsiam_jax.tools.report WORKDIR [WORKDIR ...]'
            )
        text = report.draw(argv[1:], neighbours=_NEIGHBOURS.value, images=_IMAGES.value)
        out.write_text(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; pip install {error.name}')
    except OSError as error:
        sys.exit(f'error: {out} cannot be written: {error.strerror}')
    print(f'{out}: open it in a browser')


if __name__ == '__main__':
    app.run(run, flags_parser=arguments.parser(others=True))
