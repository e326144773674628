"""Takes the disk of a run away repeatedly, for moments; prints what the run waited for.

PYTHONPATH=.:tests python tests/faults/outages.py 20 [SECONDS]

The images and the workdir are on the disk; it fails with errors of the system (away.c, needs gcc)
for 0.1 to SECONDS (3) seconds, at random moments of training, evaluation and saving, and while the
run starts again, lists the images and restores its state. The final state must equal the state of
an undisturbed run, bit for bit, and no image may count as unreadable.
"""

import collections
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable

import away
import kills
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from simsiam_jax.checkpoints import checkpoint_reader


def write_images(folder: pathlib.Path, count: int = 600) -> None:
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        path = folder / str(label) / f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(path)


class Trial:
    """Starts a run on a disk, and takes the disk away."""

    def __init__(self, folder: pathlib.Path, flags: list[str]):
        self.disk, self._flags = folder / 'disk', flags
        self.workdir, self._logs = self.disk / 'run', folder / 'logs'
        self._flag, self.log = folder / 'away', self._logs / 'process0.log'
        self._variables = away.build(folder, self.disk, self._flag)
        self.start()

    def start(self) -> None:
        os.environ.update(self._variables)  # of the run, not of this process, which is loaded
        (self._process,) = kills.start(self.workdir, 1, *self._flags, logs=self._logs)
        for name in self._variables:
            del os.environ[name]

    def steps(self) -> int:
        metrics = self.workdir / 'metrics.jsonl'
        return metrics.read_text().count('train/loss') if metrics.exists() else 0

    def await_moment(self, kind: str) -> None:
        """Waits for a random moment of this kind, of a run that is started again for some."""
        if kind in ('start', 'restore'):
            self._restart()
        before, lock = self.steps(), self.workdir / 'lock.json'
        checkpoints = self.workdir / checkpoint_reader.FOLDER
        reached: dict[str, Callable[[], bool]] = {
            'start': lambda: True,
            'restore': lock.exists,  # created before the checkpoints are listed
            'save': lambda: any(checkpoints.glob('*tmp*')),
            'step': lambda: self.steps() > before,
        }
        while not reached[kind]():
            self._check_alive()
            time.sleep(0.001)
        longest = {'start': 15.0, 'restore': 1.0, 'save': 0.0, 'step': 1.0}[kind]
        time.sleep(random.uniform(0, longest))

    def take_away(self, seconds: float) -> None:
        self._check_alive()
        self._flag.touch()
        time.sleep(seconds)
        self._flag.unlink()

    def _restart(self) -> None:
        self._check_alive()
        self._process.send_signal(signal.SIGTERM)
        self.end(143)
        self.start()

    def end(self, code: int) -> None:
        if self._process.wait(timeout=kills.LIMIT) != code:
            raise AssertionError(f'{self._process.returncode}: {self.log.read_text()}')

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise AssertionError(f'{self._process.returncode}: {self.log.read_text()}')


def run(outages: int, longest: float, folder: pathlib.Path) -> collections.Counter[str]:
    """Disturbs a run and returns what it waited for; raises if it ends differently."""
    images = folder / 'disk' / 'images'
    write_images(images)
    flags = [
        *(f'--config.{key}=folder:{images}' for key in ('data.source', 'eval.train', 'eval.test')),
        '--config.data.backend=host',
        '--config.eval.every_epochs=20',
        f'--config.epochs={30 * outages}',
        '--config.checkpoint.every_epochs=10',
        '--config.log.every_steps=10',
    ]
    trial = Trial(folder, flags)
    for number in range(outages):
        kind = ('step', 'start', 'save', 'restore')[number % 4]
        trial.await_moment(kind)
        seconds = random.uniform(0.1, longest)
        trial.take_away(seconds)
        print(f'outage {number + 1}: {kind}, {seconds:.1f} s, {trial.steps()} points', flush=True)
    trial.end(0)
    log = trial.log.read_text()
    if 'unreadable' in log or 'damaged' in log:
        raise AssertionError(f'images count as unreadable, or checkpoints as damaged: {log}')
    if any(kills.end(kills.start(folder / 'whole', 1, *flags))):
        raise AssertionError((folder / 'whole' / 'process0.log').read_text())
    if names := kills.differing(folder / 'whole', trial.workdir):
        raise AssertionError(f'the final state differs from the undisturbed run in {names}')
    ends = [(place / 'metrics.jsonl').read_text() for place in (folder / 'whole', trial.workdir)]
    losses, others = (re.findall(r'"step": (\d+),.*"train/loss": ([^,]*)', end) for end in ends)
    if losses != others:
        differing = sorted(set(losses) ^ set(others))
        raise AssertionError(f'metrics.jsonl differs in {differing}: {log}')
    return collections.Counter(re.findall(r'waiting up to \d+ s for the ([a-z ]*[a-z])', log))


if __name__ == '__main__':
    count, longest = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    with tempfile.TemporaryDirectory() as scratch:
        noticed = run(count, longest, pathlib.Path(scratch))
    print(f'{count} outages, same final state; the run waited for: {dict(noticed)}')
