"""A profiler trace of some steps, for TensorBoard and Perfetto."""

import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax

from simsiam_jax import errors, patience
from simsiam_jax.runtime import storage
from simsiam_jax.terminal import say


class StepProfiler:
    """Traces steps START to STOP, STOP excluded, into WORKDIR/profile.

    Args:
      steps: Steps to trace, 'START:STOP'; '' disables.
      workdir: Workdir of the run.

    Raises:
      UserError: `steps` has another form.
    """

    def __init__(self, steps: str, workdir: str):
        self._folder = self._local = f'{workdir}/profile'
        self._tracing = False
        self._start = self._stop = -1
        if not steps:
            return
        match = re.fullmatch(r'(\d+):(\d+)', steps)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise errors.UserError(
                f'config.profile is {steps!r}; expected START:STOP, such as 10:13'
            )
        self._start, self._stop = int(match[1]), int(match[2])

    def __enter__(self) -> 'StepProfiler':
        return self

    def before_step(self, number: int, state: Any) -> None:
        """Starts or stops the trace; call it before each step with the state of the step before."""
        if number == self._start:
            jax.block_until_ready(state)
            if storage.is_remote(self._folder):  # JAX writes traces to disks only
                self._local = tempfile.mkdtemp()
            jax.profiler.start_trace(self._local, create_perfetto_trace=True)
            self._tracing = True
        elif number == self._stop and self._tracing:
            jax.block_until_ready(state)
            self._stop_trace()

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        if self._local != self._folder:
            self._upload()
        say(f'wrote a trace of steps {self._start} to {self._stop - 1}: {self._local}')

    def _upload(self) -> None:
        local = pathlib.Path(self._local)
        try:
            for file in filter(pathlib.Path.is_file, local.rglob('*')):
                remote = storage.folder(self._folder) / file.relative_to(local)
                remote.write_bytes(file.read_bytes())
        except patience.io_errors() as error:  # the run continues, and the local trace stays
            say(f'warning: {self._folder} cannot be written: {storage.reason(error)}')
            return
        shutil.rmtree(local)
        self._local = self._folder

    def __exit__(self, *error: object) -> None:
        if self._tracing:
            self._stop_trace()
