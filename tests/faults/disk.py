"""Fills a small disk under a run; prints what it says.

PYTHONPATH=. python tests/faults/disk.py DIR

DIR is an empty folder on a disk of a few MB, for instance of

    mount -t tmpfs -o size=8m tmpfs DIR

The run must go on when a save fails, keep the checkpoints that are there, end with one line, and
go on from them when there is room.
"""

import pathlib
import sys
import tempfile
import time

import kills

from simsiam_jax.checkpoints import checkpoint_reader


def run(disk: pathlib.Path, logs: pathlib.Path) -> list[str]:
    """What the run said of the full disk."""
    workdir, filler, log = disk / 'run', disk / 'filler', logs / 'rank0.log'
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
    full, kept = log.read_text(), checkpoint_reader.list_steps(workdir / checkpoint_reader.FOLDER)
    if code != [1] or not kept or 'Traceback' in full or 'training continues' not in full:
        raise AssertionError(f'{code}, {kept}: {full}')
    filler.unlink()
    if kills.end(kills.start(workdir, 1, logs=logs)) != [0]:
        raise AssertionError(log.read_text())
    if f'resuming from step {kept[-1]}' not in log.read_text():
        raise AssertionError(log.read_text())
    return [line for line in full.splitlines() if 'cannot' in line]


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        print('\n'.join(run(pathlib.Path(sys.argv[1]), pathlib.Path(scratch))))
