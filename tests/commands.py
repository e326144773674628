"""Commands of the package as a user starts them, each in a process of its own, imported once.

The server imports what they need, which takes longer than many of them, and forks for each.
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
LIMIT = 1800  # seconds; seconds suffice where nothing else runs


def environment(devices: int = 1) -> dict[str, str]:
    """The variables of a process with so many devices, which compiles much and computes little."""
    return os.environ | {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'PYTHONPATH': str(ROOT),
        'PYTHONUNBUFFERED': '1',
    }


class Commands:
    """commands(module, *flags) is `python -m module flags` on one device, ended."""

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
    """Reads commands, a line each, and answers with their exit codes."""
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
