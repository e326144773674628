"""Fills a small disk while a run writes to it; prints the warnings and errors of the run.

PYTHONPATH=. python tests/faults/disk.py DIR

DIR is an empty folder on a disk of a few MB, for instance of

    mount -t tmpfs -o size=8m tmpfs DIR

The run must continue when a save fails, keep the existing checkpoints, and exit with a one-line
error. When there is space again, it must resume from these checkpoints.
"""

import pathlib
import sys
import tempfile
import time

import kills

from simsiam_jax.checkpoints import checkpoint_reader


def run(disk: pathlib.Path, logs: pathlib.Path) -> list[str]:
    """Returns the lines that the run printed about the full disk."""
    workdir, filler, log = disk / 'run', disk / 'filler', logs / 'process0.log'
    started = kills.start(workdir, 1, logs=logs)
    deadline = time.monotonic() + kills.LIMIT
    while not (workdir / checkpoint_reader.FOLDER).exists() or not checkpoint_reader.list_steps(
        workdir / checkpoint_reader.FOLDER
    ):
        if started[0].poll() is not None or time.monotonic() > deadline:
            raise AssertionError(log.read_text())
        time.sleep(0.05)
    with filler.open('wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    code = kills.end(started)
    output = log.read_text()
    steps = checkpoint_reader.list_steps(workdir / checkpoint_reader.FOLDER)
    if code != [1] or not steps or 'Traceback' in output or 'training continues' not in output:
        raise AssertionError(f'{code}, {steps}: {output}')
    filler.unlink()
    if kills.end(kills.start(workdir, 1, logs=logs)) != [0]:
        raise AssertionError(log.read_text())
    if f'resuming from step {steps[-1]}' not in log.read_text():
        raise AssertionError(log.read_text())
    return [line for line in output.splitlines() if 'cannot' in line]


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        print('\n'.join(run(pathlib.Path(sys.argv[1]), pathlib.Path(scratch))))
