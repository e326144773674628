"""Lets one of two processes fail to read while a run restores its state; prints the outcomes.

PYTHONPATH=.:tests python tests/faults/restoring.py 100 [SECONDS]

The checkpoints of one process fail with ESTALE, EIO, ETIMEDOUT or EMFILE (away.c, needs gcc) from a
random moment, for 0.05 to SECONDS (1) seconds. Neither process may take a complete checkpoint for
damaged. In every fourth trial, the newest checkpoint is damaged besides: then it must be moved
aside, and the one before it must be restored.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import away
import kills

from simsiam_jax.checkpoints import checkpoint, checkpoint_reader, workdirs
from simsiam_jax.runtime import distributed, launchers

ROOT = pathlib.Path(__file__).parent.parent.parent
FLAGS = ('--config.epochs=2', '--config.checkpoint.max_to_keep=3')


def prepare(disk: pathlib.Path, folder: pathlib.Path) -> None:
    """Trains a run with three checkpoints in `folder`, and creates the folder of the trials."""
    if kills.end(kills.start(folder / 'run', 1, *FLAGS)) != [0]:
        raise AssertionError((folder / 'run' / 'process0.log').read_text())
    disk.mkdir()


def damage(workdir: pathlib.Path, step: int) -> None:
    """Overwrites a part of the largest file of a checkpoint."""
    files = (workdir / checkpoint_reader.FOLDER / str(step) / 'state').rglob('*')
    largest = max((f for f in files if f.is_file()), key=lambda file: file.stat().st_size)
    with largest.open('r+b') as file:
        file.seek(largest.stat().st_size // 2)
        file.write(random.randbytes(64))


def restore(process_id: int, port: int, trials: int, longest: float, folder: pathlib.Path) -> None:
    """Restores copies of a run, in one of two processes, which lose their disk in turn."""
    distributed.start(launchers.ClusterSpec(f'127.0.0.1:{port}', 2, process_id), timeout=60)
    disk, flag = folder / 'disk', folder / f'away{process_id}'
    config = json.loads((folder / 'run' / 'config.json').read_text())
    outcomes: collections.Counter[str] = collections.Counter()
    for trial in range(trials):
        workdir, damaged = disk / f'{trial}', trial % 4 > 2
        steps = checkpoint_reader.list_steps(folder / 'run' / checkpoint_reader.FOLDER)
        if process_id == 0:
            shutil.copytree(folder / 'run', workdir)
            if damaged:
                damage(workdir, steps[-1])
        distributed.gather(None)  # the copy is complete
        thread = None
        if process_id == trial // 4 % 2:
            moment = random.choice([0.0, random.uniform(0, 0.2)])
            seconds = random.uniform(0.05, longest)
            thread = threading.Thread(target=away.take, args=(flag, moment, seconds))
            thread.start()
        begin = time.monotonic()
        with checkpoint.open(str(workdir), config, max_to_keep=3) as checkpoints:
            started = checkpoints.start_step
        lasted = time.monotonic() - begin
        if thread:
            thread.join()
        distributed.gather(None)  # process 0 has moved what is damaged
        aside = sorted(path.name for path in (workdir / workdirs.DAMAGED).glob('*'))
        expected = (steps[-2], [str(steps[-1])]) if damaged else (steps[-1], [])
        distributed.gather(None)  # both have looked
        if (started, aside) != expected:
            raise AssertionError(f'trial {trial}: step {started}, aside {aside}; not {expected}')
        outcomes['damaged, moved aside' if damaged else 'restored'] += 1
        if lasted > 0.5:
            outcomes['waited'] += 1
        if process_id == 0:
            shutil.rmtree(workdir)
    print(f'process {process_id}: {dict(outcomes)}', flush=True)
    with distributed.exit_together():
        pass


def run(trials: int, longest: float, folder: pathlib.Path) -> None:
    disk, port = folder / 'disk', kills.free_port()
    prepare(disk, folder)
    variables = [away.build(folder, disk, folder / f'away{i}') for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(trials), str(longest), str(folder), str(i), str(port)],
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'} | variables[i],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=20 * kills.LIMIT) for process in processes]
    if any(process.returncode for process in processes):
        raise AssertionError(outputs)
    for out, err in outputs:
        print(f'{out.splitlines()[-1]}, warnings of outages: {err.count("waiting up to")}')
    print(f'{trials} trials, no complete checkpoint was taken for damaged')


if __name__ == '__main__':
    count, longest = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    if len(sys.argv) > 3:
        restore(int(sys.argv[4]), int(sys.argv[5]), count, longest, pathlib.Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run(count, longest, pathlib.Path(scratch))
