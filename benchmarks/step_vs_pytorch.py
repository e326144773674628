"""This package's SimSiam step against PyTorch's on one GPU: same network, batch and precision.

    python benchmarks/step_vs_pytorch.py [--against eager compile-default] [--only resnet50-256]

`ours` is this package's step, `plain` the same step with model.kernels=plain, `merged` with
merge_views=True. `eager` is the recipe as PyTorch's users run it (torchvision's ResNet,
channels_last, bfloat16 autocast, SGD), `compile-MODE` the same under torch.compile(mode=MODE). The
names of simsiam_steps.FLAGS are this package's step with a flag of XLA; `flags` is all of them.
Normalized float32 views are already on the device. The rounds of a pair are interleaved, each step
in its own process. If the two do not fit into 80 GiB together, they run one after the other. A step
that has not started after --start-seconds is given up. Needs the package, torch and torchvision,
but no TensorFlow. --smoke runs tiny networks, on a CPU too.
"""

import argparse
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from simsiam_steps import BUILD, FLAGS, MODES, SETTINGS, SMOKE, Setting

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
        if name in FLAGS:
            own['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FLAGS[name]}'
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, text=True, env=os.environ | own)

    def answer(self, limit: float = 1e6) -> dict[str, Any]:
        """Returns the next answer; kills the process after `limit` seconds."""
        assert self._process.stdout
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith('{'):  # compilers print too
                    return json.loads(line)
        finally:
            timer.cancel()
        code = self._process.wait()
        late = f', after the limit of {limit:.0f} s' if code == -signal.SIGKILL else ''
        raise RuntimeError(f'{self.name} exited with {code}{late}')

    def run(self, steps: int) -> dict[str, Any]:
        assert self._process.stdin
        print(steps, file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    names: Sequence[str], setting: Setting, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns the report, seconds per step in every round and memory of each; interleaved."""
    workers: list[Worker] = []
    try:
        reports = []
        for name in names:  # sequential, because each may tune its kernels
            workers.append(Worker(name, setting))
            reports.append(workers[-1].answer(given.start_seconds))
        answers = [[worker.run(given.steps) for worker in workers] for _ in range(given.rounds)]
    finally:
        for worker in workers:
            worker.close()
    return [
        report | {'seconds': [a['seconds'] / given.steps for a in own], 'memory': own[-1]['memory']}
        for report, own in zip(reports, zip(*answers, strict=True), strict=True)
    ]


def compare(setting: Setting, other: str, given: argparse.Namespace) -> dict[str, Any]:
    """Returns medians of the rounds, or an error if one of the two cannot run."""
    row: dict[str, Any] = {'setting': setting.name, 'other': other}
    names = ('ours', other)
    measured = []
    try:
        for group in [[name] for name in names] if setting.apart else [names]:
            measured += measure(group, setting, given)
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
    parser.add_argument(
        '--against', nargs='+', default=['eager', *MODES], choices=[*BUILD, 'flags']
    )
    parser.add_argument('--only', nargs='+', default=[], help='settings, such as resnet50-256')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='steps of each in a round')
    parser.add_argument(
        '--seconds', type=float, default=1e9, help='seconds after which no pair starts'
    )
    parser.add_argument('--start-seconds', type=float, default=1e6, help='for one step to start')
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
    against = [x for name in arguments.against for x in (FLAGS if name == 'flags' else [name])]
    for other in against:  # torch.compile takes minutes, so the others run first
        for setting in settings:
            late = time.monotonic() - begin > arguments.seconds
            rows.append(
                {'setting': setting.name, 'other': other, 'error': 'not run: no time left'}
                if late
                else compare(setting, other, arguments)
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f'\n{table(rows)}\n\n{platform.platform()}')
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
