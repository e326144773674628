"""Writes the table and the plots of the ablations."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')

from matplotlib import pyplot as plt

from simsiam_jax.pages.runs import read_curves

COLUMNS = ('knn', 'linear', 'loss', 'z_std', 'seconds')


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns mean and standard deviation over the seeds."""
    mean = f'{np.mean(values):.{digits}f}'
    return mean if len(values) < 2 else f'{mean} +- {np.std(values, ddof=1):.{digits}f}'


def table(rows: dict[str, Any], results: dict[str, list[dict[str, float]]], data: str) -> str:
    """Returns a Markdown table of the paper's results on ImageNet and the measured results.

    Args:
      rows: Rows of the file of ablations, by name.
      results: Results of every row, one per seed.
      data: Name of the data that was used.
    """
    lines = [
        f'| row | paper | linear top-1 %, ImageNet (paper) | kNN, {data} | linear, {data} '
        '| final loss | z_std | seeds | s per run |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for name, row in rows.items():
        by_column = {key: [result[key] for result in results[name]] for key in COLUMNS}
        cells = [spread(by_column[key]) for key in COLUMNS[:-1]]
        cells += [str(len(results[name])), f'{np.mean(by_column["seconds"]):.0f}']
        lines.append('| ' + ' | '.join([name, row.where, row.paper, *cells]) + ' |')
    return '\n'.join([*lines, '', 'Mean and standard deviation over the seeds.', ''])


def plots(workdir: pathlib.Path, results: dict[str, list[dict[str, float]]]) -> None:
    """Writes figure2.png, batch.png, width.png and alternation.png, if their rows have runs."""
    pair = {'baseline': 'with stop-gradient', 'no_stop_gradient': 'without'}
    if set(pair) <= set(results):
        _figure2(workdir, pair)
    for name, prefix, xlabel in (
        ('batch', 'batch_', 'batch size of the row (ImageNet)'),
        ('width', 'width_', 'output width of the row (ImageNet)'),
        ('alternation', 'alternate_', 'steps on the same targets'),
    ):
        rows = [row for row in results if row.startswith(prefix)]
        if name == 'alternation' and 'baseline' in results:
            rows = ['baseline', *rows]
        if len(rows) > 1:
            _bars(workdir / f'{name}.png', rows, prefix, xlabel, results)


def _figure2(workdir: pathlib.Path, pair: dict[str, str]) -> None:
    names = {'train/loss': 'loss', 'train/z_std': 'std of z/|z|, x sqrt(d)', 'eval/knn_top1': 'kNN'}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout='constrained')
    for row, label in pair.items():
        runs = [read_curves(folder) for folder in sorted((workdir / row).iterdir())]
        for axis, (key, title) in zip(axes, names.items(), strict=True):
            steps = [step for step, _ in runs[0][key]]
            values = np.array([[value for _, value in run[key]] for run in runs])
            axis.plot(steps, values.mean(0), label=label)
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.25)
            axis.set(title=title, xlabel='step')
    axes[0].legend()
    figure.savefig(workdir / 'figure2.png', dpi=120)
    plt.close(figure)


def _bars(
    path: pathlib.Path,
    rows: list[str],
    prefix: str,
    xlabel: str,
    results: dict[str, list[dict[str, float]]],
) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5), layout='constrained')
    for key, label in (('knn', 'kNN'), ('linear', 'linear')):
        values = [[result[key] for result in results[row]] for row in rows]
        error = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(
            range(len(rows)), [np.mean(v) for v in values], error, marker='o', label=label
        )
    labels = ['1' if row == 'baseline' else row.removeprefix(prefix) for row in rows]
    axis.set_xticks(range(len(rows)), labels)
    axis.set(xlabel=xlabel, ylabel='top-1')
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
