"""Runs on one GPU: twice the same, cut and resumed, moved to the CPU and back, too large for it.

PYTHONPATH=. python tests/faults/gpu.py [PLATFORM]

prints in how many arrays the ends differ, by XLA's default and with deterministic operations, and
what a run says that does not fit, and the same run with what it advises. PLATFORM is cuda; with cpu
all but the last is tried.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from simsiam_jax.training import saved

ROOT = pathlib.Path(__file__).parent.parent.parent
FLAGS = [
    '--config=configs/quickstart.py',
    '--config.epochs=60',
    '--config.log.tensorboard=False',
    '--config.log.report=False',
    '--config.log.every_steps=1',
    '--config.eval.train=',
    '--config.eval.test=',
    '--config.guard=off',
]
# ResNet-18 on digits of 448 pixels: 154 GiB by the estimate, 6 with what is advised.
LARGE = [
    '--config.model.stem=imagenet',
    '--config.model.stages=(2,2,2,2)',
    '--config.model.width_multiplier=1.0',
    '--config.augment.size=448',
    '--config.batch_size=1024',
    '--config.epochs=2',
]
ADVISED = [
    '--config.model.dtype=bfloat16',
    '--config.model.remat=True',
    '--config.optim.accumulate=8',
]
VARIANTS = {'default': '', 'deterministic': '--xla_gpu_deterministic_ops=true'}


def run(workdir: pathlib.Path, *flags: str, platform: str, xla: str = '', cut: int = 0) -> str:
    """What a run printed; after `cut` more steps it gets SIGTERM."""
    metrics, log = workdir / 'metrics.jsonl', workdir.with_suffix('.log')
    begun = metrics.read_text().count('\n') if metrics.exists() else 0
    command = [sys.executable, '-m', 'simsiam_jax.main', f'--workdir={workdir}', *FLAGS, *flags]
    variables = {'JAX_PLATFORMS': platform}
    if platform != 'cpu':
        variables['XLA_FLAGS'] = xla
    with log.open('w') as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=out, stderr=out
        )
        while cut and process.poll() is None:
            if metrics.exists() and metrics.read_text().count('\n') >= begun + cut:
                process.terminate()
                break
            time.sleep(0.02)
        code = process.wait()
    text = log.read_text()
    if code not in (0, 1, 143) or 'Traceback' in text or (cut and code != 143):
        raise AssertionError(f'{workdir.name} ended with {code}: {text}')
    return text


def differing(*workdirs: pathlib.Path) -> str:
    """Of two ends."""
    one, other = (saved.load(workdir, 'state') for workdir in workdirs)
    if one.step != other.step:
        raise AssertionError(f'ends of steps {one.step} and {other.step}')
    arrays = [saved.flatten(end.tree) for end in (one, other)]
    unlike = sum(not np.array_equal(arrays[1][name], x) for name, x in arrays[0].items())
    return f'{unlike} of {len(arrays[0])} arrays differ'


def main(platform: str, folder: pathlib.Path) -> None:
    for name, xla in VARIANTS.items():
        whole, again, cut = (folder / f'{name}-{part}' for part in ('whole', 'again', 'cut'))
        run(whole, platform=platform, xla=xla)
        run(again, platform=platform, xla=xla)
        run(cut, platform=platform, xla=xla, cut=200)
        run(cut, platform=platform, xla=xla)
        print(f'{name}: the same again: {differing(whole, again)}', flush=True)
        print(f'{name}: cut and resumed: {differing(whole, cut)}', flush=True)
    moved = folder / 'moved'
    run(moved, platform=platform, cut=200)
    for where in ('cpu', platform):
        text = run(moved, platform=where, cut=50 if where == 'cpu' else 0)
        (resumed,) = [line for line in text.splitlines() if line.startswith('resuming')]
        print(f'on {where}: {resumed}', flush=True)
    if platform != 'cpu':
        for flags in (LARGE, [*LARGE, *ADVISED]):
            print(run(folder / f'large-{len(flags)}', *flags, platform=platform), flush=True)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else 'cuda', pathlib.Path(scratch))
