"""Starts runs whose two processes see different images; prints the outcomes.

PYTHONPATH=. python tests/faults/images.py [TRIALS]

The processes have other home folders, with 67 images against 65, 64 against 63, or the same number
of images and another name. TRIALS (9) runs must exit with 1 in both processes, soon after the
images are listed, with one line that names hosts, numbers and a differing image.
"""

import pathlib
import random
import re
import shutil
import socket
import sys
import tempfile
import time

import kills
import numpy as np
from PIL import Image

KINDS = ('67 and 65 images', '64 and 63 images', 'another name')


def write(folder: pathlib.Path, names: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / 'images').mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.full((8, 8), i, np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / name)


def trial(kind: str, folder: pathlib.Path) -> tuple[float, str]:
    """Returns how long two processes took to notice the difference, and their message."""
    counts = {'67 and 65 images': (67, 65), '64 and 63 images': (64, 63)}.get(kind, (64, 64))
    sides = [[f'{i:02}.png' for i in range(count)] for count in counts]
    if counts[0] == counts[1]:
        sides[1][random.randrange(64)] = 'other.png'
    random.shuffle(sides)
    for i, names in enumerate(sides):
        write(folder / f'home{i}', names)
    logs = folder / 'logs'
    shutil.rmtree(logs, ignore_errors=True)
    flags = ('--config.data.source=folder:~/images', '--config.eval.train=', '--config.eval.test=')
    homes = [{'HOME': str(folder / f'home{i}')} for i in (0, 1)]
    processes = kills.start(folder / 'run', 2, *flags, logs=logs, own_variables=homes)
    begin = time.monotonic()
    codes = kills.end(processes)
    lasted = time.monotonic() - begin
    lines = [(logs / f'process{i}.log').read_text().splitlines()[-1] for i in (0, 1)]
    host = re.escape(socket.gethostname())
    pattern = (
        rf'error: the processes see different images in folder:~/images \(process 0 on {host}: .*'
        rf'process 1 on {host}: .*first difference: .*\.png'
    )
    if codes != [1, 1] or not any(re.match(pattern, line) for line in lines):
        raise AssertionError(f'{kind}: {codes}, {lines}')
    if (folder / 'run' / 'checkpoints').exists():
        raise AssertionError('the run was started')
    return lasted, lines[0]


def run(trials: int, folder: pathlib.Path) -> None:
    for number in range(trials):
        kind = KINDS[number % len(KINDS)]
        lasted, line = trial(kind, folder)
        print(f'{kind}: exit codes 1, {lasted:.1f} s after the start: {line}', flush=True)
    print(f'{trials} runs whose processes see different images, all refused')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 9, pathlib.Path(scratch))
