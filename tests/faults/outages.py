"""Takes the images of a run away repeatedly, for moments; prints the number of outages.

PYTHONPATH=.:tests python tests/faults/outages.py 20 [SECONDS]

The folder of images is moved away at random moments of training and evaluation, for 0.1 to SECONDS
(3) seconds. The final state must equal the state of an undisturbed run, bit for bit, and no image
may count as unreadable.
"""

import pathlib
import random
import sys
import tempfile
import time

import kills
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_images(folder: pathlib.Path) -> None:
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:600], digits.target, strict=False)):
        path = folder / str(label) / f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(path)


def run(outages: int, longest: float, folder: pathlib.Path) -> int:
    """Disturbs a run and returns how many outages it noticed; raises if it ends differently."""
    images, away = folder / 'images', folder / 'away'
    write_images(images)
    flags = [
        *(f'--config.{key}=folder:{images}' for key in ('data.source', 'eval.train', 'eval.test')),
        '--config.data.backend=host',
        '--config.eval.every_epochs=20',
        f'--config.epochs={30 * outages}',
        '--config.checkpoint.every_epochs=40',
        '--config.log.every_steps=10',
    ]
    disturbed = folder / 'disturbed'
    (process,) = kills.start(disturbed, 1, *flags)
    metrics, log = disturbed / 'metrics.jsonl', disturbed / 'process0.log'
    while process.poll() is None and not (metrics.exists() and 'train/' in metrics.read_text()):
        time.sleep(0.1)  # the images are listed and the step is compiled
    for _ in range(outages):
        time.sleep(random.uniform(0.2, 1.0))
        if process.poll() is not None:
            raise AssertionError(f'ended before the outages: {log.read_text()}')
        images.rename(away)
        time.sleep(random.uniform(0.1, longest))
        away.rename(images)
    if process.wait(timeout=kills.LIMIT):
        raise AssertionError(log.read_text())
    if 'unreadable' in log.read_text():
        raise AssertionError('images count as unreadable')
    if any(kills.end(kills.start(folder / 'whole', 1, *flags))):
        raise AssertionError((folder / 'whole' / 'process0.log').read_text())
    if names := kills.differing(folder / 'whole', disturbed):
        raise AssertionError(f'the final state differs from the undisturbed run in {names}')
    return log.read_text().count('can be used again')


if __name__ == '__main__':
    count, longest = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    with tempfile.TemporaryDirectory() as scratch:
        noticed = run(count, longest, pathlib.Path(scratch))
    print(f'{count} outages, {noticed} of them noticed, same final state')
