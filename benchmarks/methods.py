"""kNN of every method on scikit-learn's digits, as a Markdown table.

    python benchmarks/methods.py --seeds 3 --epochs 100

Each run is `python -m simsiam_jax.main --config=configs/quickstart.py:METHOD` with that seed and
number of epochs, from start to end, evaluations included. The runs are sequential; each takes
about a minute on two CPU cores.
"""

import argparse
import importlib.util
import json
import pathlib
import tempfile
import time

import numpy as np

from simsiam_jax.methods import METHODS
from simsiam_jax.tasks import pretrain

CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'quickstart.py'


def measure(method: str, seed: int, epochs: int) -> tuple[float, float, float]:
    """Returns kNN top-1 at random initialization and after training, and the seconds of the run."""
    spec = importlib.util.spec_from_file_location('quickstart', CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(method)
    config.seed, config.epochs, config.log.tensorboard = seed, epochs, False
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        pretrain.run(config, workdir)
        seconds = time.perf_counter() - begin
        lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    top1 = [line['eval/knn_top1'] for line in map(json.loads, lines) if 'eval/knn_top1' in line]
    return top1[0], top1[-1], seconds


def row(method: str, runs: np.ndarray) -> str:
    random, trained, seconds = runs.T
    return (
        f'| `{method}` | {random.mean():.4f} | {trained.mean():.4f} | {trained.std(ddof=1):.4f} | '
        f'{trained.min():.4f} | {seconds.mean():.0f} |'
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', type=int, default=3, help='2 or more')
    parser.add_argument('--epochs', type=int, default=100)
    arguments = parser.parse_args()
    rows = []
    for method in METHODS:
        runs = [measure(method, seed, arguments.epochs) for seed in range(arguments.seeds)]
        rows.append(row(method, np.array(runs)))
    print(
        '\n| method | random initialization | after training, mean | std | lowest | seconds a run |'
    )
    print('|---|---|---|---|---|---|', *rows, sep='\n')


if __name__ == '__main__':
    main()
