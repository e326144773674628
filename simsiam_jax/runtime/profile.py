"""A trace of some steps, for TensorBoard and Perfetto."""

import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax

from simsiam_jax import errors
from simsiam_jax.runtime import storage
from simsiam_jax.terminal import say


class StepProfiler:
    """Traces steps START to STOP, STOP left out, into WORKDIR/profile.

    Args:
      steps: 'START:STOP'; '': none.

    Raises:
      UserError: `steps` is no such pair.
    """

    def __init__(self, steps: str, workdir: str):
        self._folder = self._local = f'{workdir}/profile'
        self._tracing = False
        self._start = self._stop = -1
        if not steps:
            return
        given = re.fullmatch(r'(\d+):(\d+)', steps)
        if not given or not 0 < int(given[1]) < int(given[2]):
            raise errors.UserError(
                f'config.profile is {steps!r}; expected START:STOP, such as 10:13'
            )
        self._start, self._stop = int(given[1]), int(given[2])

    def __enter__(self) -> 'StepProfiler':
        return self

    def at(self, number: int, state: Any) -> None:
        """To be called before each step, with what the one before has given."""
        if number == self._start:
            jax.block_until_ready(state)
            if storage.is_remote(self._folder):  # JAX writes on disks
                self._local = tempfile.mkdtemp()
            jax.profiler.start_trace(self._local, create_perfetto_trace=True)
            self._tracing = True
        elif number == self._stop and self._tracing:
            jax.block_until_ready(state)
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        if self._local != self._folder:
            self._upload()
        say(f'steps {self._start} to {self._stop - 1} are traced in {self._local}')

    def _upload(self) -> None:
        local = pathlib.Path(self._local)
        try:
            for file in filter(pathlib.Path.is_file, local.rglob('*')):
                there = storage.folder(self._folder) / file.relative_to(local)
                there.write_bytes(file.read_bytes())
        except storage.io_errors() as error:  # costs the run nothing
            say(f'warning: {self._folder} cannot be written: {storage.reason(error)}')
            return
        shutil.rmtree(local)
        self._local = self._folder

    def __exit__(self, *error: object) -> None:
        if self._tracing:
            self._end()
