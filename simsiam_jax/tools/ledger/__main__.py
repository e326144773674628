"""Runs the rows of a file of ablations and writes the table and the plots.

python -m simsiam_jax.tools.ledger --config=configs/ablations.py --workdir=DIR
    [--rows=all] [--data=digits] [--seeds=3] [--epochs=40]

A run is done once: DIR/ROW/SEED/result.json says so, and the same command goes on where it
stopped. Rows that are the same configuration share their runs. DIR/ledger.md holds the table, and
beside it lie the plots.
"""

import functools
import pathlib
import runpy
import sys

from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.tools.ledger import ablation_report, run_ablations
from simsiam_jax.training import mesh


def run(_: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.ERROR)
    mesh.use_compilation_cache()
    path = pathlib.Path(given.config)
    try:
        if not path.is_file():
            raise errors.UserError(f'--config is {path}, which is no file')
        file = runpy.run_path(str(path))
        if 'ROWS' not in file:
            raise errors.UserError(f'{path} has no ROWS; expected configs/ablations.py')
        names = run_ablations.chosen(file['ROWS'], given.rows)
        configs = {
            name: functools.partial(file['get_config'], f'{name},{given.data}') for name in names
        }
        workdir = pathlib.Path(given.workdir)
        results = run_ablations.run_all(configs, workdir, given.seeds, given.epochs)
        rows = {name: file['ROWS'][name] for name in names}
        text = ablation_report.table(rows, results, given.data)
        (workdir / 'ledger.md').write_text(text)
        ablation_report.plots(workdir, results)
        print(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except (KeyboardInterrupt, SystemExit):  # in a run, or between two
        print('stopped: rerun the same command to resume', file=sys.stderr)
        sys.exit(143)


def main() -> None:
    flags.DEFINE_string('config', 'configs/ablations.py', 'File of ablations.')
    flags.DEFINE_string('workdir', None, 'Folder for runs, table and plots.')
    flags.DEFINE_string('rows', 'all', "Names of rows, separated by commas, or 'all'.")
    flags.DEFINE_string('data', 'digits', 'Data to run the rows on: digits, cifar10 or imagenet.')
    flags.DEFINE_integer('seeds', 3, 'Number of runs of each row.')
    flags.DEFINE_integer('epochs', 40, 'Epochs of each run.')
    command_line.start(run, 'workdir')


if __name__ == '__main__':
    main()
