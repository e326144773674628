"""Time from the command to the first step: cold, with cached programs, and resumed.

    PYTHONPATH=. python benchmarks/start_up.py [--processes=2] [--epochs=50]

A small network trains on digits, on eight devices of the CPU, in one process or in several. The run
starts with an empty compilation cache, then in another workdir with a full one, and is resumed
after EPOCHS epochs, with the programs of the earlier starts. Prints a row for each: seconds until
the first step has ended, and CPU seconds of all processes until then.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = (
    '--config=configs/quickstart.py',
    '--config.model.width_multiplier=0.125',
    '--config.data.backend=host',
    '--config.eval.every_epochs=1000',
    '--config.log.report=False',
    '--config.checkpoint.every_epochs=10',
    '--config.batch_size=512',
)
STEPS = 2  # of an epoch


def start(workdir: pathlib.Path, processes: int, epochs: int, cache: pathlib.Path) -> list:
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
    variables = {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={8 // processes}',
        'JAX_PLATFORMS': 'cpu',
        'XDG_CACHE_HOME': str(cache),
        'PYTHONUNBUFFERED': '1',
    }
    command = [sys.executable, '-m', 'simsiam_jax.main', f'--workdir={workdir}', *FLAGS]
    command += [f'--config.epochs={epochs}', '--config.log.every_steps=1']
    if processes > 1:
        command += [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
    return [
        subprocess.Popen(
            [*command, *([f'--process_id={i}'] if processes > 1 else [])],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def cpu_seconds(process: subprocess.Popen) -> float:
    fields = pathlib.Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def await_points(started: list, workdir: pathlib.Path, points: int) -> None:
    """Waits until more than `points` losses are logged."""
    metrics = workdir / 'metrics.jsonl'
    while not metrics.exists() or metrics.read_text().count('train/loss') <= points:
        if any(process.poll() is not None for process in started):
            raise SystemExit(''.join(process.communicate()[0] for process in started))
        time.sleep(0.02)


def timed(what: str, started: list, workdir: pathlib.Path, points: int = 0) -> None:
    """Prints a row when a loss is logged after `points` of them."""
    begin = time.perf_counter()
    await_points(started, workdir, points)
    lasted, used = time.perf_counter() - begin, sum(map(cpu_seconds, started))
    print(f'| {what} | {lasted:.1f} s | {used:.1f} s |', flush=True)


def stop(started: list) -> None:
    started[0].terminate()
    for process in started:
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--epochs', type=int, default=50)
    arguments = parser.parse_args()
    processes, epochs = arguments.processes, arguments.epochs
    print('| start | until the first logged step | CPU |\n|---|---|---|')
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        given = processes, 2 * epochs, root / 'cache'
        started = start(root / 'first', *given)
        timed(f'{processes} processes, empty cache', started, root / 'first')
        await_points(started, root / 'first', STEPS * epochs)
        stop(started)
        started = start(root / 'second', *given)
        timed(f'{processes} processes, full cache', started, root / 'second')
        stop(started)
        points = (root / 'first' / 'metrics.jsonl').read_text().count('train/loss')
        started = start(root / 'first', *given)
        timed(f'{processes} processes, resumed at epoch {epochs}', started, root / 'first', points)
        stop(started)


if __name__ == '__main__':
    main()
