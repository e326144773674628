"""Runs ablations one after another and collects their results."""

import contextlib
import datetime
import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.checkpoints import same_run
from simsiam_jax.pages import runs
from simsiam_jax.tasks import memory, pretrain, probe

Result = dict[str, float]


def prepare(config: ConfigDict, seed: int, epochs: int) -> ConfigDict:
    """Returns a row's configuration with up to 20 kNN evaluations and one checkpoint, at the end.

    A warm-up of 10 epochs, the paper's for 100, takes at most a quarter of the epochs.
    """
    config.seed, config.epochs = seed, epochs
    config.optim.warmup_epochs = min(config.optim.warmup_epochs, epochs // 4)
    config.eval.every_epochs = max(2, epochs // 20)
    config.eval.baselines = False
    config.checkpoint.every_epochs = epochs
    config.log.tensorboard = False
    config.log.every_steps = 5
    return config


def run_once(config: ConfigDict, folder: pathlib.Path) -> Result:
    """Pre-trains and probes in an empty folder, with output to log.txt; returns the results."""
    shutil.rmtree(folder, ignore_errors=True)  # remains of an interrupted run
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    with (folder / 'log.txt').open('w') as log, contextlib.redirect_stdout(log):
        with memory.oom_as_user_error(config):
            pretrain.run(config, str(folder))
        curves = runs.read_curves(folder)
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
    """Returns test top-1 of logistic regression, with its strength selected on a holdout."""
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
    """Returns results by row, one per seed; runs what has no result yet.

    Args:
      configs: Functions that make the configurations, by row.
      workdir: Folder of the runs.
      seeds: Number of runs of each row.
      epochs: Epochs of each run.
    """
    runners: dict[str, str] = {}  # configuration -> the row that runs it
    runner = {name: runners.setdefault(make().to_json(), name) for name, make in configs.items()}
    # All rows with a seed before the next seed, so that an early stop leaves a complete table.
    jobs = [(name, seed) for seed in range(seeds) for name in dict.fromkeys(runner.values())]
    done: dict[str, list[Result]] = {name: [] for name in runner.values()}
    begin, ran = time.perf_counter(), 0
    for number, (name, seed) in enumerate(jobs, 1):
        folder = workdir / name / str(seed)
        config = prepare(configs[name](), seed, epochs)
        path = folder / 'result.json'
        if path.exists():
            done[name].append(_finished(path, config))
            continue
        settings = config.to_json()  # the run fills in more
        result = run_once(config, folder)
        path.write_text(json.dumps({'config': json.loads(settings), **result}) + '\n')
        done[name].append(result)
        ran += 1
        left = (time.perf_counter() - begin) / ran * (len(jobs) - number)
        print(
            f'[{number}/{len(jobs)}] {name} seed {seed}  kNN {result["knn"]:.4f}  '
            f'linear {result["linear"]:.4f}  z_std {result["z_std"]:.3f}  '
            f'{result["seconds"]:.0f} s  left {datetime.timedelta(seconds=round(left))}',
            flush=True,
        )
    return {name: done[source] for name, source in runner.items()}


def _finished(path: pathlib.Path, config: ConfigDict) -> Result:
    """Returns the results of a finished run.

    Raises:
      UserError: They are of another configuration.
    """
    stored = json.loads(path.read_text())
    settings = stored.pop('config', None)
    if settings is None:
        raise errors.UserError(
            f'{path} does not say what it was measured with. Move its folder away, or use a new '
            '--workdir'
        )
    if changed := same_run.changed_keys(json.loads(config.to_json()), settings):
        raise errors.UserError(
            f'{path} was measured with another configuration: {", ".join(changed)}. Use a new '
            '--workdir, or the same --data, --epochs and package'
        )
    return stored


def select_rows(file: dict[str, Any], names: str) -> list[str]:
    """Returns the names of rows that --rows selects.

    Args:
      file: Content of a file of ablations: ROWS, and CORE if it has one.
      names: Names separated by commas, 'all' or 'core'.

    Raises:
      UserError: A row does not exist.
    """
    rows = file['ROWS']
    if names == 'all':
        return list(rows)
    if names == 'core' and 'CORE' in file:
        return list(file['CORE'])
    for name in names.split(','):
        errors.check_choice('row in --rows', name, rows)
    return names.split(',')
