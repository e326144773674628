"""The same bits in every process that runs a program on a GPU."""

import os
import pathlib
from collections.abc import MutableMapping

from simsiam_jax import errors
from simsiam_jax.runtime import storage

_FLAG = '--xla_gpu_exclude_nondeterministic_ops'


def enable(workdir: str, process: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets XLA_FLAGS so that sums on a GPU repeat; call it before JAX uses a device.

    XLA selects some kernels by their speed, which differs from process to process. Its choices are
    kept in WORKDIR/autotune-PROCESS.textproto, and later starts of the run use them again.

    Args:
      workdir: Workdir of the run, on a disk.
      process: Number of this process, from 0.
      environment: Variables that XLA reads.

    Raises:
      UserError: The workdir is in a bucket, where XLA cannot write.
    """
    if storage.is_remote(workdir):
        raise errors.UserError(
            f'config.deterministic=True with workdir {workdir}: expected a folder on a disk, '
            'because XLA keeps its choice of kernels there. Set --workdir to one'
        )
    storage.mkdirs(storage.folder(workdir))
    file = pathlib.Path(workdir) / f'autotune-{process}.textproto'
    flags = [f'{_FLAG}=true', f"--xla_gpu_dump_autotune_results_to='{file}'"]
    if file.exists():
        flags.append(f"--xla_gpu_load_autotune_results_from='{file}'")
    environment['XLA_FLAGS'] = ' '.join([environment.get('XLA_FLAGS', ''), *flags]).strip()


def check_enabled() -> None:
    """Raises UserError unless XLA_FLAGS has the flag: a running JAX does not read it any more."""
    if _FLAG not in os.environ.get('XLA_FLAGS', ''):
        raise errors.UserError(
            'deterministic=True sets flags of XLA, which are read before JAX uses a device. Set '
            f"os.environ['XLA_FLAGS'] = '{_FLAG}=true' before JAX is imported, or use the command "
            'simsiam_jax.main'
        )
