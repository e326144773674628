"""Runs the rows of a file of ablations, and writes a table and plots.

::

    python -m simsiam_jax.tools.ledger --config=configs/ablations.py --workdir=DIR \\
        [--rows=all] [--data=digits] [--seeds=3] [--epochs=40]

A finished run has DIR/ROW/SEED/result.json with its configuration and is not repeated: rerun the
same command to resume. Results of another configuration are refused.
Rows with identical configurations share their runs. The table is DIR/ledger.md; the plots are in
DIR too.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from simsiam_jax import command_line, config_files, errors
from simsiam_jax.tools.ledger import ablation_report, run_ablations
from simsiam_jax.training import mesh


def run(_: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.ERROR)
    mesh.use_compilation_cache()
    try:
        path = config_files.find(given.config)
        file = config_files.run(path)
        if not {'ROWS', 'get_config'} <= set(file):
            raise errors.UserError(
                f'{path} has no ROWS or no get_config(); pass a file like configs/ablations.py'
            )
        names = run_ablations.select_rows(file, given.rows)
        configs = {name: functools.partial(_config, file, path, name) for name in names}
        workdir = pathlib.Path(given.workdir)
        results = run_ablations.run_all(configs, workdir, given.seeds, given.epochs)
        rows = {name: file['ROWS'][name] for name in names}
        text = ablation_report.table(rows, results, given.data.split(',')[0])
        (workdir / 'ledger.md').write_text(text)
        ablation_report.plots(workdir, results)
        print(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except (KeyboardInterrupt, SystemExit):  # in a run, or between two runs
        print('stopped: rerun the same command to resume', file=sys.stderr)
        sys.exit(143)


def _config(file: dict[str, Any], path: str, name: str) -> ConfigDict:
    variant = f'{name},{flags.FLAGS.data}'
    with config_files.file_errors(path, f'{path}:{variant}'):
        return file['get_config'](variant)


def main() -> None:
    command_line.define_path('config', 'configs/ablations.py', 'File of ablations.')
    command_line.define_path('workdir', None, 'Folder of the runs, the table and the plots.')
    flags.DEFINE_string('rows', 'all', "Names of rows, separated by commas, 'all' or 'core'.")
    flags.DEFINE_string(
        'data',
        'digits',
        'Data: digits, cifar10_small, cifar10 or imagenet, and words: cifar10,npz:FILE.',
    )
    flags.DEFINE_integer('seeds', 3, 'Number of runs of each row.')
    flags.DEFINE_integer('epochs', 40, 'Epochs of each run.')
    command_line.start(run, 'workdir')


if __name__ == '__main__':
    main()
