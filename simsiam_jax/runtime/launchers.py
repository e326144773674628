"""Finds how a run was launched: the id of this process, its GPU, and whether there is a TPU."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping

from simsiam_jax import errors
from simsiam_jax.runtime import host_list

# If a scheduler names no port, the job's number selects one of the upper 4096.
_FIRST_PORT = 61440


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The processes of a run.

    Attributes:
      coordinator: Address HOST:PORT of process 0.
      num_processes: Number of processes in the run.
      process_id: Number of this process, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


def from_environment(env: Mapping[str, str]) -> ClusterSpec | None:
    """Returns the processes that a launcher's variables name.

    Reads JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (in Kubernetes's indexed
    jobs JOB_COMPLETION_INDEX), else Open MPI's variables, else the variables of SLURM's srun.
    Returns None for a single process, and if the launcher that set the variables no longer runs.

    Raises:
      UserError: Some of the variables are missing or malformed.
    """
    if 'JAX_COORDINATOR_ADDRESS' in env:
        process_id = env.get('JAX_PROCESS_ID', env.get('JOB_COMPLETION_INDEX'))
        if process_id is None or 'JAX_NUM_PROCESSES' not in env:
            raise errors.UserError(
                'JAX_COORDINATOR_ADDRESS is set; expected JAX_NUM_PROCESSES and JAX_PROCESS_ID '
                'too. Set them, or unset JAX_COORDINATOR_ADDRESS for a single process'
            )
        coordinator, num_processes = env['JAX_COORDINATOR_ADDRESS'], env['JAX_NUM_PROCESSES']
        return ClusterSpec(coordinator, int(num_processes), int(process_id))
    # Open MPI comes before SLURM: in a SLURM job, mpirun starts its agents with srun, and the
    # processes inherit srun's variables.
    if _started_by_mpirun(env):
        uri = env.get('OMPI_MCA_orte_hnp_uri', '')  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
        job, address = re.match(r'(\d+)', uri), re.search(r'tcp://([^,:]+)', uri)
        if not job or not address:
            raise errors.UserError(
                f'no address in OMPI_MCA_orte_hnp_uri={uri!r} (Open MPI 5 sets none). Pass '
                '--coordinator, --num_processes and --process_id=$OMPI_COMM_WORLD_RANK'
            )
        port = _FIRST_PORT + int(job[1]) // 4096 % 4096
        num_processes, process_id = env['OMPI_COMM_WORLD_SIZE'], env['OMPI_COMM_WORLD_RANK']
        return ClusterSpec(f'{address[1]}:{port}', int(num_processes), int(process_id))
    # Only srun sets the variables of a step. A shell that outlived its job still has these
    # variables, but its task's process is gone.
    if int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1 and _alive(int(env['SLURM_TASK_PID'])):
        host = host_list.first_host(env['SLURM_STEP_NODELIST'], env)
        port = _FIRST_PORT + int(env['SLURM_JOB_ID']) % 4096
        num_processes, process_id = env['SLURM_STEP_NUM_TASKS'], env['SLURM_PROCID']
        return ClusterSpec(f'{host}:{port}', int(num_processes), int(process_id))
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started_by_mpirun(env: Mapping[str, str]) -> bool:
    """Returns whether a running mpirun started several processes.

    mpirun removes its session's folder when it exits.
    """
    session = env.get('PMIX_SERVER_TMPDIR', '/')
    return int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 and os.path.isdir(session)


def local_devices(env: Mapping[str, str]) -> list[int] | None:
    """Returns the GPU of a process that shares its host; None for all visible GPUs."""
    if 'JAX_COORDINATOR_ADDRESS' in env:
        return None  # JAX reads JAX_LOCAL_DEVICE_IDS itself
    if _started_by_mpirun(env):
        local_size = int(env['OMPI_COMM_WORLD_LOCAL_SIZE'])
        local_rank = env['OMPI_COMM_WORLD_LOCAL_RANK']
    else:  # SLURM_GTIDS lists the host's tasks
        local_size = len(env.get('SLURM_GTIDS', '').split(','))
        local_rank = env.get('SLURM_LOCALID', '')
    visible = env.get('CUDA_VISIBLE_DEVICES')
    # A launcher that shows the process only one GPU, or fewer GPUs than the job has on this host,
    # has already chosen the process's own GPUs.
    gpus_on_host = max(int(env.get('SLURM_GPUS_ON_NODE', 0)), 2)
    if local_size == 1 or (visible and len(visible.split(',')) < gpus_on_host):
        return None
    return [int(local_rank)]


# Google's id on the PCI bus, its devices that JAX counts as TPUs, and the class of accelerators for
# later TPUs. Google's other devices are network cards and disks.
_GOOGLE = '0x1ae0'
_ACCELERATOR = '0x12'
_TPUS = {'0x0027', '0x0056', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076'}


def has_tpu(devices: str = '/sys/bus/pci/devices') -> bool:
    """Returns whether this machine has a TPU that JAX can use.

    Files in /dev do not answer this: every machine that passes devices on to guests has /dev/vfio.

    Args:
      devices: Folder of the devices on the PCI bus.
    """
    if not importlib.util.find_spec('libtpu'):
        return False
    for device in pathlib.Path(devices).glob('*'):
        with contextlib.suppress(OSError):
            vendor, kind, category = (
                (device / name).read_text().strip() for name in ('vendor', 'device', 'class')
            )
            if vendor == _GOOGLE and (kind in _TPUS or category.startswith(_ACCELERATOR)):
                return True
    return False
