"""Multi-process runs: rendezvous, agreement between processes, exit and preemption."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from simsiam_jax import errors
from simsiam_jax.runtime import launchers
from simsiam_jax.runtime.launchers import ClusterSpec

T = TypeVar('T')

_COMPLETE = 'all processes are connected'


class MissingProcessError(errors.TemporaryError):
    """Processes of the run did not connect; a restart may succeed."""


def start(cluster: ClusterSpec | None = None, *, timeout: int = 300) -> None:
    """Connects the processes of a run; does nothing for a single process.

    Args:
      cluster: Processes of the run; None reads the environment, or a Cloud TPU's metadata.
      timeout: Seconds after which a missing or silent process stops the run.

    Raises:
      MissingProcessError: Processes did not connect.
      UserError: Processes disagree about the run, or variables of the environment are missing.
    """
    cluster = cluster or launchers.from_environment(os.environ)
    if cluster is None:
        if launchers.has_tpu():
            jax.distributed.initialize(
                initialization_timeout=timeout, heartbeat_timeout_seconds=timeout
            )
        return
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise errors.UserError(
            f'--process_id is {cluster.process_id}; expected 0 to {cluster.num_processes - 1}, '
            f'because --num_processes is {cluster.num_processes}'
        )
    if cluster.num_processes == 1:
        return
    rendezvous(cluster, timeout)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        launchers.local_devices(os.environ),
        cluster_detection_method='deactivate',
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )
    # If another process falls silent, JAX logs the reason and stops this process with SIGABRT.
    # absl's handler of SIGABRT would bury the reason under the stacks of all threads.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    # Gloo, which connects CPUs, waits 30 s for the others at the first exchange, later without end.
    broadcast_from_process_0(None)
    gather(None)


def rendezvous(cluster: ClusterSpec, timeout: int) -> None:
    """Waits until all processes are connected; if one is missing, raises in all that connected.

    JAX's own start would abort the process without naming the missing ones.

    Raises:
      MissingProcessError: Names the ranks that connected and the missing ranks.
      UserError: The coordinator is not HOST:PORT, or its port cannot be used.
    """
    host, _, port = cluster.coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise errors.UserError(f'the coordinator is {cluster.coordinator!r}; expected HOST:PORT')
    deadline = time.monotonic() + timeout
    connect = _accept_all if cluster.process_id == 0 else _report_in
    verdict = connect(cluster, host, int(port), deadline)
    if verdict != _COMPLETE:
        raise MissingProcessError(verdict)


def _accept_all(cluster: ClusterSpec, host: str, port: int, deadline: float) -> str:
    """Waits in process 0 for all others, sends all the same verdict and returns it."""
    connections: dict[int, socket.socket] = {}
    verdict = _COMPLETE
    try:
        server = socket.create_server(('', port), backlog=cluster.num_processes)
    except OSError as error:
        raise errors.UserError(
            f'coordinator port {port} cannot be used: {error.strerror}. Choose another port, '
            'because another run may use this one'
        ) from error
    with server:
        while len(connections) < cluster.num_processes - 1 and verdict == _COMPLETE:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                process_id, num_processes = map(int, connection.recv(64).split())
            except TimeoutError:
                if time.monotonic() >= deadline:
                    verdict = _missing(cluster, {0, *connections})
                continue
            except (OSError, ValueError):
                continue  # not a process of this run
            if process_id in connections or num_processes != cluster.num_processes:
                verdict = (
                    f'process {process_id} of {num_processes} connected twice, or to a run of '
                    f'{cluster.num_processes} processes'
                )
            connections[process_id] = connection
        for connection in connections.values():
            with connection:
                connection.sendall(verdict.encode())
    return verdict


def _report_in(cluster: ClusterSpec, host: str, port: int, deadline: float) -> str:
    """Connects to process 0 and returns its verdict."""
    while time.monotonic() < deadline + 5:  # process 0 must give up first
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                server.sendall(f'{cluster.process_id} {cluster.num_processes}'.encode())
                server.settimeout(max(deadline + 5 - time.monotonic(), 0.01))
                if verdict := server.recv(4096).decode():
                    return verdict
        except OSError:
            pass
        time.sleep(0.2)  # process 0 does not listen yet
    return f'process {cluster.process_id} got no answer from process 0 at {cluster.coordinator}'


def _missing(cluster: ClusterSpec, connected: set[int]) -> str:
    absent = ', '.join(str(x) for x in range(cluster.num_processes) if x not in connected)
    present = ', '.join(map(str, sorted(connected)))
    return (
        f'only {len(connected)} of {cluster.num_processes} processes connected to '
        f'{cluster.coordinator} (ranks {present}); missing ranks: {absent}. Check their logs and '
        'that they can reach this port'
    )


def broadcast_from_process_0(value: Any) -> Any:
    """Returns process 0's value, which JSON must be able to hold, in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(zlib.compress(json.dumps(value).encode()), np.uint8)  # names of images
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = np.resize(data, size)  # the other processes send any bytes of this size
    received = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return json.loads(zlib.decompress(received.tobytes()))


def from_process_0(function: Callable[[], T]) -> T:
    """Returns function() of process 0, which JSON must be able to hold, in every process.

    Raises:
      UserError: The function raised it; all processes raise it.
    """
    result, problem, temporary = None, '', False
    if jax.process_index() == 0:
        try:
            result = function()
        except errors.UserError as error:
            if jax.process_count() == 1:
                raise
            problem, temporary = str(error), isinstance(error, errors.TemporaryError)
    result, problem, temporary = broadcast_from_process_0([result, problem, temporary])
    if problem:
        raise (errors.TemporaryError if temporary else errors.UserError)(problem)
    return result


def gather(value: Any) -> list[Any]:
    """Returns every process's value, which JSON must be able to hold, in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.resize(data, sizes.max()))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def all_processes(value: bool) -> bool:
    """Returns whether the value is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Stops all processes of a run when one of them fails within this context.

    The failed process exits at once: with 1 after a UserError that is not temporary, with
    os.EX_TEMPFAIL otherwise. A
    regular exit would wait for the other processes, which wait for the failed one.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if jax.process_count() == 1 or isinstance(error, SystemExit):
            _disconnect()
            raise
        code = os.EX_TEMPFAIL
        if isinstance(error, errors.UserError):
            code = code if isinstance(error, errors.TemporaryError) else 1
            print(f'error: {error}', file=sys.stderr)
        else:
            report(error, f' in process {jax.process_index()} of {jax.process_count()}')
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _disconnect()


def report(error: Exception, where: str = '') -> None:
    """Prints the traceback of an error other than UserError, and a last line on what to do."""
    traceback.print_exception(error)
    logs = 'if another process died, see its log; ' if where else ''
    print(
        f'error: {type(error).__name__}{where}: {errors.reason(error)}; {logs}'
        'rerun the same command to resume from the last checkpoint',
        file=sys.stderr,
    )


def _disconnect() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('end')
        jax.distributed.shutdown()


class PreemptionHandler:
    """Turns SIGTERM, the end of the terminal (SIGHUP) and a first Ctrl-C into a request to stop.

    Any process of a run may receive them. Within this context none of them ends the process.
    should_stop(step) becomes true at the same step in every process.
    """

    _received = False

    def __enter__(self) -> 'PreemptionHandler':
        # In a run of several processes, JAX's own handler notifies the other processes.
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        self._interrupt = signal.signal(signal.SIGINT, self._pass_on)
        self._hangup = signal.getsignal(signal.SIGHUP)
        if self._hangup != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, self._leave_terminal)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._interrupt)  # a second Ctrl-C stops the run at once
        os.kill(os.getpid(), signal.SIGTERM)

    def _leave_terminal(self, number: int, frame: FrameType | None) -> None:
        for stream in (1, 2):  # writing to a closed terminal would fail
            if os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Returns whether to save and stop after this step; must be called at every step."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGHUP, self._hangup)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
