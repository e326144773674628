"""Runs the rows of a file of ablations and writes the table and the plots.

python -m simsiam_jax.tools.ledger --config=configs/ablations.py --workdir=DIR
    [--rows=all] [--data=digits] [--seeds=3] [--epochs=40]

A run is done once: DIR/ROW/SEED/result.json says so, and the same command goes on where it
stopped. Rows that are the same configuration share their runs. DIR/ledger.md holds the table, and
beside it lie the plots.
"""

import contextlib
import datetime
import functools
import json
import math
import pathlib
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.pages import runs
from simsiam_jax.tasks import memory, pretrain, probe
from simsiam_jax.tools import arguments
from simsiam_jax.tools.ledger import ablation_report
from simsiam_jax.training import mesh

_CONFIG: Any = flags.DEFINE_string('config', 'configs/ablations.py', 'A file of ablations.')
_WORKDIR: Any = flags.DEFINE_string('workdir', None, 'Where runs, table and plots go.')
_ROWS: Any = flags.DEFINE_string('rows', 'all', "Names with commas between them, or 'all'.")
_DATA: Any = flags.DEFINE_string('data', 'digits', 'What the rows are run on.')
_SEEDS: Any = flags.DEFINE_integer('seeds', 3, 'Runs of every row.')
_EPOCHS: Any = flags.DEFINE_integer('epochs', 40, 'Of every run.')

Result = dict[str, float]


def prepare(config: ConfigDict, seed: int, epochs: int) -> ConfigDict:
    """The row's configuration for the ledger: kNN twenty times, one checkpoint at the end."""
    config.seed, config.epochs = seed, epochs
    config.eval.every_epochs = max(1, epochs // 20)
    config.eval.baselines = False
    config.checkpoint.every_epochs = epochs
    config.log.tensorboard = False
    config.log.every_steps = 5
    return config


def run_once(config: ConfigDict, folder: pathlib.Path) -> Result:
    """Pre-trains and probes; what they print goes to log.txt."""
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was cut off has left
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    with (folder / 'log.txt').open('w') as log, contextlib.redirect_stdout(log):
        with memory.explained(config):
            pretrain.run(config, str(folder))
        curves = runs.curves(folder)
        last = {key: values[-1][1] for key, values in curves.items()}
        linear = _linear(folder) if math.isfinite(last['train/loss']) else math.nan
    return {
        'knn': last['eval/knn_top1'],
        'linear': linear,
        'loss': last['train/loss'],
        'z_std': last['train/z_std'],
        'seconds': time.perf_counter() - begin,
    }


def _linear(folder: pathlib.Path) -> float:
    """Test top-1 of a logistic regression on the features, its strength chosen on a holdout."""
    config = config_lib.probe()
    config.init_from = str(folder)
    config.eval.baselines = False
    config.optim.learning_rates = ()
    config.logistic.strengths = (1.0, 10.0, 100.0)
    probe.run(config, str(folder))
    return json.loads((folder / 'probe.json').read_text())['checkpoint']['L-BFGS']['top1']


def run_all(
    configs: Mapping[str, Callable[[], ConfigDict]], workdir: pathlib.Path, seeds: int, epochs: int
) -> dict[str, list[Result]]:
    """Results by row, one a seed; finished runs are read, the others run."""
    first: dict[str, str] = {}  # configuration -> the row that runs it
    own = {name: first.setdefault(make().to_json(), name) for name, make in configs.items()}
    # Every row once before any twice: a table that is stopped early is a whole one.
    jobs = [(name, seed) for seed in range(seeds) for name in dict.fromkeys(own.values())]
    done: dict[str, list[Result]] = {name: [] for name in own.values()}
    begin, ran = time.perf_counter(), 0
    for number, (name, seed) in enumerate(jobs, 1):
        folder = workdir / name / str(seed)
        path = folder / 'result.json'
        if path.exists():
            done[name].append(json.loads(path.read_text()))
            continue
        result = run_once(prepare(configs[name](), seed, epochs), folder)
        path.write_text(json.dumps(result) + '\n')
        done[name].append(result)
        ran += 1
        left = (time.perf_counter() - begin) / ran * (len(jobs) - number)
        print(
            f'[{number}/{len(jobs)}] {name} seed {seed}  kNN {result["knn"]:.4f}  '
            f'linear {result["linear"]:.4f}  z_std {result["z_std"]:.3f}  '
            f'{result["seconds"]:.0f} s  left {datetime.timedelta(seconds=round(left))}',
            flush=True,
        )
    return {name: done[source] for name, source in own.items()}


def chosen(rows: dict[str, Any], names: str) -> list[str]:
    """The rows that --rows names.

    Raises:
      UserError: there is no such row.
    """
    if names == 'all':
        return list(rows)
    for name in names.split(','):
        errors.check_choice('a row of --rows', name, rows)
    return names.split(',')


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    mesh.use_compilation_cache()
    path = pathlib.Path(_CONFIG.value)
    try:
        if not path.is_file():
            raise errors.UserError(f'--config is {path}, which is no file')
        file = runpy.run_path(str(path))
        if 'ROWS' not in file:
            raise errors.UserError(f'{path} has no ROWS; expected configs/ablations.py')
        names = chosen(file['ROWS'], _ROWS.value)
        configs = {
            name: functools.partial(file['get_config'], f'{name},{_DATA.value}') for name in names
        }
        workdir = pathlib.Path(_WORKDIR.value)
        results = run_all(configs, workdir, _SEEDS.value, _EPOCHS.value)
        rows = {name: file['ROWS'][name] for name in names}
        text = ablation_report.table(rows, results, _DATA.value)
        (workdir / 'ledger.md').write_text(text)
        ablation_report.plots(workdir, results)
        print(text)
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except (KeyboardInterrupt, SystemExit):  # in a run, or between two
        print('stopped: what is done is kept, the same command goes on from there', file=sys.stderr)
        sys.exit(143)


if __name__ == '__main__':
    app.run(main, flags_parser=arguments.parser('workdir'))
