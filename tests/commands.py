"""Runs the package's commands like a user, each in a process of its own.

A server imports the package once and forks for each command, because imports take longer than many
commands.
"""

import json
import os
import pathlib
import runpy
import select
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 1800  # seconds; an idle machine needs only a few


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the variables of a process with N CPU devices and most optimizations disabled."""
    return os.environ | {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'PYTHONPATH': str(ROOT),
        'PYTHONUNBUFFERED': '1',
    }


class Commands:
    """Runs `python -m MODULE FLAGS` on one device: commands(module, *flags)."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, module: str, *flags: str) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            self._server.stdin.write(json.dumps([folder, module, *flags]) + '\n')
            self._server.stdin.flush()
            if not select.select([self._server.stdout], [], [], LIMIT)[0]:
                self._server.kill()
                raise TimeoutError(f'{module} {" ".join(flags)} takes more than {LIMIT} s')
            code = int(self._server.stdout.readline())
            out, err = ((pathlib.Path(folder) / name).read_text() for name in ('out', 'err'))
        return subprocess.CompletedProcess([module, *flags], code, out, err)

    def close(self) -> None:
        self._server.communicate()


def serve() -> None:
    """Reads one command per line and answers with its exit code."""
    import simsiam_jax.tasks.pretrain
    import simsiam_jax.tasks.probe
    import simsiam_jax.tasks.supervised  # noqa: F401

    for line in sys.stdin:
        folder, module, *flags = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for name, stream in (('out', sys.stdout), ('err', sys.stderr)):
            os.dup2(os.open(f'{folder}/{name}', os.O_WRONLY | os.O_CREAT), stream.fileno())
        sys.argv = [module, *flags]
        runpy.run_module(module, run_name='__main__', alter_sys=True)
        sys.exit()


if __name__ == '__main__':
    serve()
