"""This package's SimSiam step against PyTorch's on one GPU: same network, batch and precision.

    python benchmarks/step_vs_pytorch.py [--against eager compile plain] [--only resnet50-256]

`ours` is this package's step, `plain` the same step with model.kernels=plain. `eager` is the recipe
as PyTorch's users run it (torchvision's ResNet, channels_last, bfloat16 autocast, SGD), `compile`
the same under torch.compile(mode='max-autotune'). Normalized float32 views are already on the
device. The rounds of a pair are interleaved, each step in its own process. If the two do not fit
into 80 GiB together, they run one after the other. Needs the package, torch and torchvision, but no
TensorFlow. --smoke runs tiny networks, on a CPU too.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from simsiam_steps import BUILD, SETTINGS, SMOKE, Setting

ROOT = pathlib.Path(__file__).parent.parent


def work(name: str, setting: Setting) -> None:
    """Runs in a separate process: reads numbers of steps from standard input and times them."""
    begin = time.perf_counter()
    run, parameters, memory = BUILD[name](setting)
    run(3)
    print(json.dumps({'parameters': parameters, 'start': time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        print(json.dumps({'seconds': run(int(line)), 'memory': memory()}), flush=True)


class Worker:
    def __init__(self, name: str, setting: Setting):
        self.name = name
        command = [sys.executable, __file__, '--worker', name, json.dumps(vars(setting))]
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        # Several processes share the GPU, so none may preallocate its memory.
        own = {'PYTHONPATH': path, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, text=True, env=os.environ | own)

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith('{'):  # compilers print too
                return json.loads(line)
        raise RuntimeError(f'{self.name} exited with {self._process.wait()}')

    def run(self, steps: int) -> dict[str, Any]:
        assert self._process.stdin
        print(steps, file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    names: Sequence[str], setting: Setting, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Returns the report, seconds per step in every round and memory of each; interleaved."""
    workers: list[Worker] = []
    try:
        reports = []
        for name in names:  # sequential, because each may tune its kernels
            workers.append(Worker(name, setting))
            reports.append(workers[-1].answer())
        answers = [[worker.run(steps) for worker in workers] for _ in range(rounds)]
    finally:
        for worker in workers:
            worker.close()
    return [
        report | {'seconds': [a['seconds'] / steps for a in own], 'memory': own[-1]['memory']}
        for report, own in zip(reports, zip(*answers, strict=True), strict=True)
    ]


def compare(setting: Setting, other: str, rounds: int, steps: int) -> dict[str, Any]:
    """Returns medians of the rounds, or an error if one of the two cannot run."""
    row: dict[str, Any] = {'setting': setting.name, 'other': other}
    names = ('ours', other)
    measured = []
    try:
        for group in [[name] for name in names] if setting.apart else [names]:
            measured += measure(group, setting, rounds, steps)
        if measured[0]['parameters'] != measured[1]['parameters']:
            raise RuntimeError(f'the networks differ: {[m["parameters"] for m in measured]}')
    except RuntimeError as error:
        return row | {'error': str(error)}
    seconds = np.array([m['seconds'] for m in measured])
    ratios = seconds[1] / seconds[0]
    rates = np.median(setting.batch / seconds, axis=1)
    return row | {
        'images_per_second': dict(zip(names, rates.tolist(), strict=True)),
        'ratio': float(np.median(ratios)),
        'ratios': [float(ratios.min()), float(ratios.max())],
        'memory': {name: m['memory'] for name, m in zip(names, measured, strict=True)},
        'start_seconds': [m['start'] for m in measured],
    }


def table(rows: list[dict[str, Any]]) -> str:
    def gib(value: int | None) -> str:
        return '-' if value is None else f'{value / 2**30:.1f}'

    lines = [
        '| network-batch | against | ours, images/s | other | ratio (lowest-highest) | GiB | GiB |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        head = f'| {row["setting"]} | {row["other"]} | '
        if 'error' in row:
            lines.append(f'{head}{row["error"]} | | | | |')
            continue
        ours, other = row['images_per_second'].values()
        low, high = row['ratios']
        memory = ' | '.join(gib(value) for value in row['memory'].values())
        lines.append(
            f'{head}{ours:,.1f} | {other:,.1f} | {row["ratio"]:.2f} ({low:.2f}-{high:.2f}) | '
            f'{memory} |'
        )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--against', nargs='+', default=['eager', 'compile'], choices=[*BUILD])
    parser.add_argument('--only', nargs='+', default=[], help='settings, such as resnet50-256')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='steps of each in a round')
    parser.add_argument(
        '--seconds', type=float, default=1e9, help='seconds after which no pair starts'
    )
    parser.add_argument('--json', type=pathlib.Path, help='file of the results')
    parser.add_argument('--smoke', action='store_true', help='a tiny network')
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, setting = arguments.worker
        work(name, Setting(**json.loads(setting)))
        return
    begin, rows = time.monotonic(), []
    if arguments.smoke:
        arguments.rounds, arguments.steps = 2, 2
    settings = SMOKE if arguments.smoke else SETTINGS
    if arguments.only:
        settings = [setting for setting in settings if setting.name in arguments.only]
    for other in arguments.against:  # torch.compile takes minutes, so the others run first
        for setting in settings:
            late = time.monotonic() - begin > arguments.seconds
            rows.append(
                {'setting': setting.name, 'other': other, 'error': 'not run: no time left'}
                if late
                else compare(setting, other, arguments.rounds, arguments.steps)
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f'\n{table(rows)}\n\n{platform.platform()}')
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
