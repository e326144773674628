"""Several processes as one run: how they find each other, agree, and leave together."""

import contextlib
import glob
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from simsiam_jax import errors
from simsiam_jax.runtime import launchers
from simsiam_jax.runtime.launchers import ClusterSpec


class MissingError(errors.UserError):
    """Processes of the run are not there; they may be the next time."""


def start(peers: ClusterSpec | None = None, *, timeout: int = 300) -> None:
    """Joins the processes of a run; a single process needs and does nothing.

    Args:
      peers: None: as the environment says; on a Cloud TPU as its metadata says.
      timeout: seconds after which a process that has not come, or is silent, ends the run.

    Raises:
      MissingError: processes have not come.
      UserError: they disagree about the run, or the environment is half set.
    """
    peers = peers or launchers.from_environment(os.environ)
    if peers is None:
        if importlib.util.find_spec('libtpu') and glob.glob('/dev/accel*') + glob.glob(
            '/dev/vfio/*'
        ):
            jax.distributed.initialize(
                initialization_timeout=timeout, heartbeat_timeout_seconds=timeout
            )
        return
    if not 0 <= peers.process_id < peers.num_processes:
        raise errors.UserError(
            f'--process_id is {peers.process_id}; expected from 0 to under --num_processes = '
            f'{peers.num_processes}'
        )
    if peers.num_processes == 1:
        return
    rendezvous(peers, timeout)
    jax.distributed.initialize(
        peers.coordinator,
        peers.num_processes,
        peers.process_id,
        launchers.local_devices(os.environ),
        cluster_detection_method='deactivate',
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )
    # Where another falls silent JAX says so and ends this process by SIGABRT, whose handler of
    # absl's would bury the reason under the stacks of all threads.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def rendezvous(peers: ClusterSpec, timeout: int) -> None:
    """Returns in every process once all are there, or raises in all that came.

    JAX's own start would end a process by an abort that names nobody.

    Raises:
      MissingError: names the ranks that came and those that did not.
    """
    host, _, port = peers.coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise errors.UserError(f'the coordinator is {peers.coordinator!r}; expected HOST:PORT')
    deadline = time.monotonic() + timeout
    answer = (_call if peers.process_id == 0 else _answer)(peers, host, int(port), deadline)
    if answer != 'all here':
        raise MissingError(answer)


def _call(peers: ClusterSpec, host: str, port: int, deadline: float) -> str:
    """Process 0: waits for the others and tells them all the same."""
    came: dict[int, socket.socket] = {}
    text = 'all here'
    try:
        server = socket.create_server(('', port), backlog=peers.num_processes)
    except OSError as error:
        raise errors.UserError(
            f'port {port} of the coordinator cannot be used: {error.strerror}; another run may '
            'have it, choose another'
        ) from error
    with server:
        while len(came) < peers.num_processes - 1 and text == 'all here':
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
            if rank in came or count != peers.num_processes:
                text = (
                    f'process {rank} of {count} has come twice or to a run of {peers.num_processes}'
                )
            came[rank] = other
        for other in came.values():
            with other:
                other.sendall(text.encode())
    return text


def _answer(peers: ClusterSpec, host: str, port: int, deadline: float) -> str:
    """The others: what process 0 says."""
    while time.monotonic() < deadline + 5:  # it is the one to lose patience first
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                server.sendall(f'{peers.process_id} {peers.num_processes}'.encode())
                server.settimeout(max(deadline + 5 - time.monotonic(), 0.01))
                if text := server.recv(4096).decode():
                    return text
        except OSError:
            pass
        time.sleep(0.2)  # process 0 is not there yet
    return f'process 0 does not answer at {peers.coordinator}; process {peers.process_id} gave up'


def _missing(peers: ClusterSpec, came: set[int]) -> str:
    absent = ', '.join(str(rank) for rank in range(peers.num_processes) if rank not in came)
    seen = ', '.join(map(str, sorted(came)))
    return (
        f'only {len(came)} of {peers.num_processes} processes connected to {peers.coordinator} '
        f'(ranks {seen}); missing ranks: {absent}. Check their logs and that they reach this port'
    )


def broadcast_from_process_0(value: Any) -> Any:
    """Process 0's value (what JSON can hold) in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = np.resize(data, size)  # any bytes will do elsewhere
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


def all_processes(here: bool) -> bool:
    """Whether it is so in every process."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Within this context the failure of one of several processes stops all of them.

    The failed process exits at once, with 1 after a UserError and os.EX_TEMPFAIL otherwise: the
    regular way out would wait for the other processes, which wait for it.
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
        os._exit(1 if mendable else os.EX_TEMPFAIL)
    _leave()


def report(error: Exception, where: str = '') -> None:
    """The traceback of what is no UserError, and a last line on what to do."""
    traceback.print_exception(error)
    peers = 'where another process has died its own log says why; ' if where else ''
    print(
        f'error: {type(error).__name__}{where}: {errors.reason(error)}; {peers}'
        'the same command goes on from the last checkpoint',
        file=sys.stderr,
    )


def _leave() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('end')
        jax.distributed.shutdown()


class PreemptionHandler:
    """Within this context SIGTERM to any process of a run does not end it, nor does a first Ctrl-C.

    asked(step) says to leave, and says so at the same step in every process.
    """

    _received = False

    def __enter__(self) -> 'PreemptionHandler':
        # Of several processes JAX's own handler tells the others.
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        self._interrupt = signal.signal(signal.SIGINT, self._pass_on)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._interrupt)  # a second one ends the run at once
        os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """To be called at every step; whether to save and leave after this one."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
