"""Kills and restarts a run repeatedly; prints the number of kills of each kind.

PYTHONPATH=. python tests/faults/kills.py 30 [PROCESSES]

SIGKILL arrives at random moments: at the start, between two steps, or during a save. If the run has
several processes, one is killed and the others must exit by themselves. The final state must equal
the state of an uninterrupted run, bit for bit.
"""

import collections
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from simsiam_jax.checkpoints import checkpoint_reader

ROOT = pathlib.Path(__file__).parent.parent.parent
FLAGS = [
    '--config=configs/quickstart.py',
    '--config.epochs=12',
    '--config.model.width_multiplier=0.125',
    '--config.model.stages=(1,)',
    '--config.log.tensorboard=False',
    '--config.log.report=False',
    '--config.log.every_steps=1',
    '--config.eval.every_epochs=1000',
    '--config.eval.baselines=False',
    '--config.checkpoint.every_epochs=0.3',
]
LIMIT = 600  # seconds within which a run must end


def start(
    workdir: pathlib.Path | str,
    processes: int,
    *flags: str,
    logs: pathlib.Path | None = None,
    own_variables: Sequence[dict[str, str]] = ({}, {}),
) -> list[subprocess.Popen]:
    """Starts the processes of a run on two CPU devices; their output goes to process*.log.

    Args:
      workdir: Workdir of the run.
      processes: Number of processes, 1 or 2.
      *flags: Flags besides FLAGS.
      logs: Folder of the output; None uses the workdir.
      own_variables: Environment variables of each process.
    """
    logs = logs or workdir
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    devices = f'--xla_force_host_platform_device_count={2 // processes}'
    variables = {
        'XLA_FLAGS': devices,
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    command = [sys.executable, '-m', 'simsiam_jax.main', f'--workdir={workdir}', *FLAGS, *flags]
    if processes > 1:
        command += [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
        command += ['--timeout=20']
    started = []
    for process_id in range(processes):
        own = [f'--process_id={process_id}'] if processes > 1 else []
        with (logs / f'process{process_id}.log').open('a') as log:
            started.append(
                subprocess.Popen(
                    command + own,
                    cwd=ROOT,
                    env=os.environ | variables | own_variables[process_id],
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def free_port() -> int:
    with socket.create_server(('', 0)) as server:
        return server.getsockname()[1]


def await_moment(kind: str, workdir: pathlib.Path, processes: list[subprocess.Popen]) -> None:
    """Waits for a random moment of this kind, or for the end of the run."""
    metrics = workdir / 'metrics.jsonl'
    deadline = time.monotonic() + (random.uniform(0, 5) if kind == 'start' else LIMIT)
    before = metrics.read_text().count('\n') if metrics.exists() else 0
    steps = random.randint(1, 5)
    while time.monotonic() < deadline and processes[0].poll() is None:
        if kind != 'start' and metrics.exists():
            reached = metrics.read_text().count('\n') >= before + steps
            saving = any((workdir / checkpoint_reader.FOLDER).glob('*tmp*'))
            if reached and (kind == 'step' or saving):
                break
        time.sleep(0.0005)
    if kind == 'step':
        time.sleep(random.uniform(0, 0.1))


def end(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=LIMIT) for process in processes]


def differing(one: pathlib.Path | str, other: pathlib.Path | str) -> list[str]:
    """Returns the arrays in which the final states of two runs differ in any bit."""
    ends = [checkpoint_reader.load(workdir, 'state') for workdir in (one, other)]
    arrays, others = (checkpoint_reader.flatten(end.tree) for end in ends)
    if ends[0].step != ends[1].step or arrays.keys() != others.keys():
        raise AssertionError(f'steps {ends[0].step} and {ends[1].step}, or different arrays')
    return [
        name
        for name, array in arrays.items()
        if np.asarray(array).tobytes() != np.asarray(others[name]).tobytes()
    ]


def run(kills: int, processes: int, folder: pathlib.Path, *flags: str) -> collections.Counter[str]:
    """Kills a run and returns the counts; raises if it does not resume or ends differently."""
    if any(end(start(folder / 'whole', processes, *flags))):
        raise AssertionError((folder / 'whole' / 'process0.log').read_text())
    counts: collections.Counter[str] = collections.Counter()
    workdir = folder / 'killed'
    while counts.total() < kills:
        kind = random.choice(['start', 'step', 'save', 'save'])
        started = start(workdir, processes, *flags)
        await_moment(kind, workdir, started)
        if started[0].poll() is not None:
            raise AssertionError(f'ended before a kill, after {dict(counts)}')
        random.choice(started).kill()
        codes = end(started)
        if 0 in codes or 1 in codes:
            raise AssertionError(f'{codes}: {(workdir / "process0.log").read_text()}')
        counts[kind] += 1
        print(
            kind,
            codes,
            checkpoint_reader.list_steps(workdir / checkpoint_reader.FOLDER),
            flush=True,
        )
    if any(end(start(workdir, processes, *flags))):
        raise AssertionError((workdir / 'process0.log').read_text())
    if names := differing(folder / 'whole', workdir):
        raise AssertionError(f'the final state differs from the uninterrupted run in {names}')
    return counts


if __name__ == '__main__':
    count, processes = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as scratch:
        counts = run(count, processes, pathlib.Path(scratch))
    print(f'{counts.total()} kills, {processes} processes, same final state: {dict(counts)}')
