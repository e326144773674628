"""What launchers say in their variables: which process of a run this is, and which GPU is its."""

import dataclasses
import os
import re
from collections.abc import Mapping

from simsiam_jax import errors

# Where a scheduler names no port, one of the upper 4096, by the job's number.
_PORTS = 61440


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The processes of a run: process 0 is found at `coordinator`, HOST:PORT."""

    coordinator: str
    num_processes: int
    process_id: int


def from_environment(env: Mapping[str, str]) -> ClusterSpec | None:
    """What a launcher says in its variables; None for a single process, and where it is gone.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (in Kubernetes's indexed
    jobs JOB_COMPLETION_INDEX), else the variables of Open MPI, else those of SLURM's srun.

    Raises:
      UserError: the variables are there in part.
    """
    if 'JAX_COORDINATOR_ADDRESS' in env:
        rank = env.get('JAX_PROCESS_ID', env.get('JOB_COMPLETION_INDEX'))
        if rank is None or 'JAX_NUM_PROCESSES' not in env:
            raise errors.UserError(
                'JAX_COORDINATOR_ADDRESS is set; JAX_NUM_PROCESSES and JAX_PROCESS_ID were '
                'expected too: set them, or unset it for a single process'
            )
        return ClusterSpec(env['JAX_COORDINATOR_ADDRESS'], int(env['JAX_NUM_PROCESSES']), int(rank))
    # Before SLURM: within its jobs mpirun starts its own agents by srun, whose variables pass on.
    if _by_mpirun(env):
        uri = env.get('OMPI_MCA_orte_hnp_uri', '')  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
        job, address = re.match(r'(\d+)', uri), re.search(r'tcp://([^,:]+)', uri)
        if not job or not address:
            raise errors.UserError(
                f'no address in OMPI_MCA_orte_hnp_uri={uri!r} (Open MPI 5 sets none); give '
                '--coordinator, --num_processes and --process_id=$OMPI_COMM_WORLD_RANK'
            )
        port = _PORTS + int(job[1]) // 4096 % 4096
        count, rank = env['OMPI_COMM_WORLD_SIZE'], env['OMPI_COMM_WORLD_RANK']
        return ClusterSpec(f'{address[1]}:{port}', int(count), int(rank))
    # srun alone sets the step's; a shell that outlived its job still has them, but not its task.
    if int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1 and _alive(int(env['SLURM_TASK_PID'])):
        first = re.match(r'([^,\[]+)(?:\[(\d+))?', env['SLURM_STEP_NODELIST'])
        assert first
        host = first[1] + (first[2] or '')
        port = _PORTS + int(env['SLURM_JOB_ID']) % 4096
        count, rank = env['SLURM_STEP_NUM_TASKS'], env['SLURM_PROCID']
        return ClusterSpec(f'{host}:{port}', int(count), int(rank))
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _by_mpirun(env: Mapping[str, str]) -> bool:
    """Whether Open MPI started several; its folder for the session is removed with it."""
    session = env.get('PMIX_SERVER_TMPDIR', '/')
    return int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 and os.path.isdir(session)


def local_devices(env: Mapping[str, str]) -> list[int] | None:
    """The GPU of a process among others on its host; None: all that it sees."""
    if 'JAX_COORDINATOR_ADDRESS' in env:
        return None  # JAX reads JAX_LOCAL_DEVICE_IDS itself
    if _by_mpirun(env):
        count, local = int(env['OMPI_COMM_WORLD_LOCAL_SIZE']), env['OMPI_COMM_WORLD_LOCAL_RANK']
    else:  # SLURM_GTIDS: the host's tasks
        count, local = len(env.get('SLURM_GTIDS', '').split(',')), env.get('SLURM_LOCALID', '')
    visible = env.get('CUDA_VISIBLE_DEVICES')
    # Of fewer GPUs than its host has for the job, or of one, the process has been given its own.
    host = max(int(env.get('SLURM_GPUS_ON_NODE', 0)), 2)
    if count == 1 or (visible and len(visible.split(',')) < host):
        return None
    return [int(local)]
