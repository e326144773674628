"""Tests runs on one GPU: repeated, interrupted, moved to the CPU and back, too large for memory.

PYTHONPATH=. python tests/faults/gpu.py [PLATFORM]

Prints images/s and how many arrays of the final states differ, with the default and with
--config.deterministic=True. Then prints the output of a run that does not fit, and of the same run
with the settings that it recommends. PLATFORM is cuda; with cpu, the runs that do not fit are
skipped.
"""

import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import kills

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
# ResNet-18 on digits of 448 pixels: an estimated 154 GiB, or 6 with the recommended settings.
LARGE = [
    '--config.model.stem=imagenet',
    '--config.model.stages=(2,2,2,2)',
    '--config.model.width_multiplier=1.0',
    '--config.augment.size=448',
    '--config.batch_size=1024',
    '--config.epochs=2',
]
RECOMMENDED = [
    '--config.model.dtype=bfloat16',
    '--config.model.remat=True',
    '--config.optim.gradient_accumulation_steps=8',
]
VARIANTS = {'default': [], 'deterministic': ['--config.deterministic=True']}


def run(workdir: pathlib.Path, *flags: str, platform: str, cut: int = 0, code: int = 0) -> str:
    """Returns the output of a run, which must exit with `code`.

    If `cut` is not 0, the run gets SIGTERM after `cut` more steps and must exit with 143.
    """
    metrics, log = workdir / 'metrics.jsonl', workdir.with_suffix('.log')
    before = metrics.read_text().count('\n') if metrics.exists() else 0
    command = [sys.executable, '-m', 'simsiam_jax.main', f'--workdir={workdir}', *FLAGS, *flags]
    variables = {'JAX_PLATFORMS': platform}
    with log.open('w') as out:
        process = subprocess.Popen(
            command, cwd=kills.ROOT, env=os.environ | variables, stdout=out, stderr=out
        )
        while cut and process.poll() is None:
            if metrics.exists() and metrics.read_text().count('\n') >= before + cut:
                process.terminate()
                break
            time.sleep(0.02)
        status = process.wait()
    text = log.read_text()
    if status != (143 if cut else code) or 'Traceback' in text:
        raise AssertionError(f'{workdir.name} exited with {status}: {text}')
    return text


def main(platform: str, folder: pathlib.Path) -> None:
    for name, flags in VARIANTS.items():
        whole, again, cut = (folder / f'{name}-{part}' for part in ('whole', 'again', 'cut'))
        rates = re.findall(r'(\d+) images/s', run(whole, *flags, platform=platform))
        print(f'{name}: {statistics.median(map(int, rates)):.0f} images/s', flush=True)
        for other in (again, cut):  # as the guide says
            other.mkdir()
            for file in whole.glob('autotune-*'):
                shutil.copy(file, other)
        run(again, *flags, platform=platform)
        run(cut, *flags, platform=platform, cut=200)
        run(cut, *flags, platform=platform)
        for what, other in (('repeated', again), ('interrupted and resumed', cut)):
            names = kills.differing(whole, other)
            print(f'{name}: {what}: {len(names)} arrays differ', flush=True)
    moved = folder / 'moved'
    run(moved, platform=platform, cut=200)
    for device in ('cpu', platform):
        text = run(moved, platform=device, cut=50 if device == 'cpu' else 0)
        (resumed,) = [line for line in text.splitlines() if line.startswith('resuming')]
        print(f'on {device}: {resumed}', flush=True)
    if platform != 'cpu':
        print(run(folder / 'large', *LARGE, platform=platform, code=1), flush=True)
        print(run(folder / 'recommended', *LARGE, *RECOMMENDED, platform=platform), flush=True)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else 'cuda', pathlib.Path(scratch))
