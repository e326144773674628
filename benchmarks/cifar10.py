"""SimSiam, or another method, on CIFAR-10: trains, evaluates, and writes the row for RESULTS.md.

    python benchmarks/cifar10.py --words=200ep,npz:cifar10.npz --workdir=DIR [--linear]
        [--config.KEY=VALUE ...]
    python benchmarks/cifar10.py --plot=knn.png DIR/result.json ...

Runs `configs/cifar10.py:WORDS` with kNN every 20 epochs, then the probe on cached features and,
with --linear, the paper's linear protocol (LARS, 90 epochs). Stopped by SIGTERM or Ctrl-C, it
resumes with the same command. Writes DIR/result.json. --plot draws kNN against epochs, with what
others published. The file cifar10.npz has the arrays train_images, train_labels, test_images and
test_labels; without it the data come from TFDS.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from simsiam_jax.pages import runs

ROOT = pathlib.Path(__file__).parent.parent

# kNN top-1 by epoch: the maximum over all epochs until then for lightly, the last epoch for the
# others. lightly: its benchmark page, k 200, T 0.1. PatrickHua/SimSiam (k 200) and the paper
# (appendix D): read off a curve.
PUBLISHED = {
    'lightly, batch 128': {200: 0.819},
    'lightly, batch 512': {200: 0.764, 800: 0.904},
    'PatrickHua/SimSiam': {100: 0.764, 200: 0.846, 300: 0.869, 400: 0.881, 800: 0.903},
    'the paper, appendix D': {800: 0.90},
}


def run(config: str, workdir: pathlib.Path, last_file: str, *arguments: str) -> None:
    """Runs simsiam_jax.main unless it wrote its last file; exits with its code if that is not 0."""
    if (workdir / last_file).exists():
        return
    command = ['--config=' + config, f'--workdir={workdir}', *arguments]
    code = subprocess.call([sys.executable, '-m', 'simsiam_jax.main', *command])
    if code:
        sys.exit(code)


def measure(words: str, workdir: pathlib.Path, linear: bool, given: list[str]) -> dict[str, Any]:
    """Trains and evaluates what is not finished yet; returns the results."""
    trained, command = workdir / 'pretrain', json.dumps([words, *given])
    workdir.mkdir(parents=True, exist_ok=True)
    started = workdir / 'started.json'
    if started.exists() and started.read_text() != command:
        sys.exit(f'error: {workdir} was started with {started.read_text()}; use a new --workdir')
    started.write_text(command)
    run(
        f'{ROOT}/configs/cifar10.py:{words}',
        trained,
        'verdict.json',
        '--config.eval.every_epochs=20',
        '--config.log.tensorboard=False',
        *given,
    )
    source = f'--config.init_from={trained}'
    run(f'{ROOT}/configs/linear.py:cached', workdir / 'probe', 'probe.json', source)
    if linear:
        plain = '--config.log.tensorboard=False'
        run(f'{ROOT}/configs/linear.py', workdir / 'linear', 'result.json', source, plain)
    (record,) = runs.read_runs([trained])
    curve = record.curves['eval/knn_top1']
    probed = json.loads((workdir / 'probe' / 'probe.json').read_text())['checkpoint']
    result = {
        'words': words,
        'given': given,
        'config': record.config,
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'versions': {'python': platform.python_version(), 'jax': jax.__version__},
        'date': time.strftime('%Y-%m-%d', time.localtime(record.starts[0]['time'])),
        'knn': [(step / record.steps_per_epoch, top1) for step, top1 in curve],
        'probe': max(kind['top1'] for kind in probed.values()),
        'images_per_second': record.median('train/images_per_second') or 0.0,
        'training_seconds': record.seconds,
    }
    if linear:
        result['linear'] = json.loads((workdir / 'linear' / 'result.json').read_text())
    return result


def row(result: dict[str, Any]) -> str:
    """Returns the row of RESULTS.md."""
    curve, config = result['knn'], result['config']
    cells = [
        f'`cifar10.py:{result["words"]}`' + ''.join(f' `{key}`' for key in result['given']),
        result['date'],
        result['device'],
        f'{config["epochs"]}',
        f'{config["seed"]}',
        f'{curve[-1][1]:.4f}',
        f'{max(top1 for _, top1 in curve):.4f}',
        f'{result["probe"]:.4f}',
        f'{result["images_per_second"]:,.0f}',
        f'{result["training_seconds"] / 60:.1f}',
    ]
    return f'| {" | ".join(cells)} |'


HEAD = (
    '| config | date | device | epochs | seed | kNN, last | kNN, best | linear (probe) | images/s '
    '| minutes |\n|---|---|---|---|---|---|---|---|---|---|'
)


def plot(path: str, results: list[dict[str, Any]]) -> None:
    """Draws kNN against epochs: lines of the results, points of what others published."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout='constrained')
    for result in results:
        label = f'{result["words"].split(",npz:")[0]}, seed {result["config"]["seed"]}'
        axis.plot(*zip(*result['knn'], strict=True), marker='.', label=label)
    for (name, points), marker in zip(PUBLISHED.items(), 'sDo*', strict=True):
        axis.scatter(points.keys(), points.values(), marker=marker, label=f'{name} (published)')
    axis.set(xlabel='epoch', ylabel='kNN top-1, CIFAR-10')
    axis.legend(fontsize='small')
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--words', default='200ep', help='words of configs/cifar10.py')
    parser.add_argument('--workdir', type=pathlib.Path)
    parser.add_argument('--linear', action='store_true', help='linear protocol of the paper, too')
    parser.add_argument('--plot', help='file of the plot of the given result.json files')
    arguments, others = parser.parse_known_args()
    if arguments.plot:
        plot(arguments.plot, [json.loads(pathlib.Path(path).read_text()) for path in others])
        return
    if not arguments.workdir:
        parser.error('--workdir is missing')
    result = measure(arguments.words, arguments.workdir, arguments.linear, others)
    (arguments.workdir / 'result.json').write_text(json.dumps(result, indent=1) + '\n')
    print(f'{HEAD}\n{row(result)}')


if __name__ == '__main__':
    main()
