"""Several processes as one run: how they find each other, agree, and leave together."""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from simsiam_jax import errors

# Where a scheduler names no port, one of the upper 4096, by the job's number.
_PORTS = 61440


class MissingError(errors.UserError):
    """Processes of the run are not there; they may be the next time."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """The processes of a run: process 0 is found at `coordinator`, HOST:PORT."""

    coordinator: str
    count: int
    rank: int


def start(peers: Peers | None = None, *, timeout: int = 300) -> None:
    """Joins the processes of a run; a single process needs and does nothing.

    Args:
      peers: None: as the environment says; on a Cloud TPU as its metadata says.
      timeout: seconds after which a process that has not come, or is silent, ends the run.

    Raises:
      MissingError: processes have not come.
      UserError: they disagree about the run, or the environment is half set.
    """
    peers = peers or from_environment(os.environ)
    if peers is None:
        if importlib.util.find_spec('libtpu') and glob.glob('/dev/accel*') + glob.glob(
            '/dev/vfio/*'
        ):
            jax.distributed.initialize(
                initialization_timeout=timeout, heartbeat_timeout_seconds=timeout
            )
        return
    if not 0 <= peers.rank < peers.count:
        raise errors.UserError(
            f'--process_id is {peers.rank}; expected from 0 to under --num_processes = '
            f'{peers.count}'
        )
    if peers.count == 1:
        return
    roll_call(peers, timeout)
    jax.distributed.initialize(
        peers.coordinator,
        peers.count,
        peers.rank,
        _local_devices(os.environ),
        cluster_detection_method='deactivate',
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )


def from_environment(env: Mapping[str, str]) -> Peers | None:
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
        return Peers(env['JAX_COORDINATOR_ADDRESS'], int(env['JAX_NUM_PROCESSES']), int(rank))
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
        return Peers(f'{address[1]}:{port}', int(count), int(rank))
    # srun alone sets the step's; a shell that outlived its job still has them, but not its task.
    if int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1 and _alive(int(env['SLURM_TASK_PID'])):
        first = re.match(r'([^,\[]+)(?:\[(\d+))?', env['SLURM_STEP_NODELIST'])
        assert first
        host = first[1] + (first[2] or '')
        port = _PORTS + int(env['SLURM_JOB_ID']) % 4096
        count, rank = env['SLURM_STEP_NUM_TASKS'], env['SLURM_PROCID']
        return Peers(f'{host}:{port}', int(count), int(rank))
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


def _local_devices(env: Mapping[str, str]) -> list[int] | None:
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


def roll_call(peers: Peers, timeout: int) -> None:
    """Returns in every process once all are there, or raises in all that came.

    JAX's own start would end a process by an abort that names nobody.

    Raises:
      MissingError: names the ranks that came and those that did not.
    """
    host, _, port = peers.coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise errors.UserError(f'the coordinator is {peers.coordinator!r}; expected HOST:PORT')
    deadline = time.monotonic() + timeout
    answer = (_call if peers.rank == 0 else _answer)(peers, host, int(port), deadline)
    if answer != 'all here':
        raise MissingError(answer)


def _call(peers: Peers, host: str, port: int, deadline: float) -> str:
    """Process 0: waits for the others and tells them all the same."""
    came: dict[int, socket.socket] = {}
    text = 'all here'
    try:
        server = socket.create_server(('', port), backlog=peers.count)
    except OSError as error:
        raise errors.UserError(
            f'port {port} of the coordinator cannot be used: {error.strerror}; another run may '
            'have it, choose another'
        ) from error
    with server:
        while len(came) < peers.count - 1 and text == 'all here':
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                other, _ = server.accept()
                other.settimeout(5)
                rank, count = map(int, other.recv(64).split())
            except TimeoutError:
                if time.monotonic() >= deadline:
                    text = _missing(peers, {0, *came})
                continue
            except (OSError, ValueError):
                continue  # nobody of ours
            if rank in came or count != peers.count:
                text = f'process {rank} of {count} has come twice or to a run of {peers.count}'
            came[rank] = other
        for other in came.values():
            with other:
                other.sendall(text.encode())
    return text


def _answer(peers: Peers, host: str, port: int, deadline: float) -> str:
    """The others: what process 0 says."""
    while time.monotonic() < deadline + 5:  # it is the one to lose patience first
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                server.sendall(f'{peers.rank} {peers.count}'.encode())
                server.settimeout(max(deadline + 5 - time.monotonic(), 0.01))
                if text := server.recv(4096).decode():
                    return text
        except OSError:
            pass
        time.sleep(0.2)  # process 0 is not there yet
    return f'process 0 does not answer at {peers.coordinator}; process {peers.rank} gave up'


def _missing(peers: Peers, came: set[int]) -> str:
    absent = ', '.join(str(rank) for rank in range(peers.count) if rank not in came)
    seen = ', '.join(map(str, sorted(came)))
    return (
        f'{len(came)} of {peers.count} processes came to {peers.coordinator}: ranks {seen}; '
        f'missing: {absent}; look into their logs, and whether they reach this port'
    )


def from_first(value: Any) -> Any:
    """Process 0's value (what JSON can hold) in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = np.resize(data, size)  # any bytes will do elsewhere
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


def all_agree(here: bool) -> bool:
    """Whether it is so in every process."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


@contextlib.contextmanager
def ending(code: int) -> Iterator[None]:
    """Within it, the failure of one process of several ends all of them.

    The process that failed leaves at once, with 1 after a UserError and `code` after others: on
    the way of a single process it would wait for the others, who wait for it.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if jax.process_count() == 1 or isinstance(error, SystemExit):
            _leave()
            raise
        mendable = isinstance(error, errors.UserError)
        if mendable:
            print(f'error: {error}', file=sys.stderr)
        else:
            report(error, f' in process {jax.process_index()} of {jax.process_count()}')
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if mendable else code)
    _leave()


def report(error: Exception, where: str = '') -> None:
    """The traceback of what is no UserError, and a last line on what to do."""
    traceback.print_exception(error)
    reason = (str(error).strip() or 'no reason given').splitlines()[0][:200]
    peers = 'where another process has died its own log says why; ' if where else ''
    print(
        f'error: {type(error).__name__}{where}: {reason}; {peers}the same command goes on from the '
        'last checkpoint',
        file=sys.stderr,
    )


def _leave() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('end')
        jax.distributed.shutdown()


class Sigterm:
    """Within this context SIGTERM to any process of a run does not end it.

    asked(step) says to leave, and says so at the same step in every process.
    """

    _received = False

    def __enter__(self) -> 'Sigterm':
        # Of several processes JAX's own handler tells the others.
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def asked(self, step: int) -> bool:
        """To be called at every step; whether to save and leave after this one."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *error: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
