"""The lock file of a workdir, which allows one run at a time."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from etils import epath

from simsiam_jax import errors, patience
from simsiam_jax.runtime import storage

NAME = 'lock.json'
HEARTBEAT = 5.0  # seconds between two writes of the file
_TIMEOUT = 3 * HEARTBEAT


class Lock:
    """Locks a workdir with a file that names host and process, until release() or death.

    The file is rewritten every HEARTBEAT seconds. A lock is taken over if its process is gone, or
    if its process is on another host and the file no longer changes. A process that was silent for
    so long, because it or its disk stood still, then finds another run's name in the file, and
    exits at once: two runs must not write into one workdir.

    Args:
      workdir: Workdir of the run; created if missing.

    Raises:
      UserError: Another run is active in the workdir.
      OSError: The workdir cannot be written; in a bucket, any of patience.io_errors().
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / NAME
        self._owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'run': uuid.uuid4().hex}
        self._heartbeats = 0
        storage.mkdirs(workdir)
        if not storage.is_remote(workdir):
            self._create(self._path)
        else:  # in a bucket, two runs that start at once can both create the file
            holder = _read(self._path)
            if holder and _is_active(holder, self._path):
                raise self._refusal(holder)
            self._write(self._path)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._write_heartbeats, daemon=True)
        self._thread.start()

    def _create(self, path: epath.Path) -> None:
        """Creates the file; of several runs at once, all but one raise UserError."""
        try:
            open(path, 'x').close()
        except FileExistsError:
            self._remove_dead(path)
            self._create(path)
        else:
            self._write(path)

    def _remove_dead(self, path: epath.Path) -> None:
        try:
            holder, modified = _read(path), os.stat(path).st_mtime_ns
            if _is_active(holder, path):
                raise self._refusal(_read(path) or holder)
            # Several runs may find the same holder dead. Each must first create a claim, a file
            # named after this state of the lock. Otherwise a slower run would remove the lock that
            # a faster one has created by then.
            claim = path.with_name(f'{path.name}.{modified}')
            self._create(claim)
            try:
                if os.stat(path).st_mtime_ns != modified:
                    raise self._refusal(_read(path))
                path.unlink()
            finally:
                claim.unlink()
        except FileNotFoundError:
            return  # the lock was released or removed meanwhile

    def _refusal(self, holder: dict[str, Any]) -> errors.UserError:
        deadline = time.monotonic() + _TIMEOUT
        while not holder and time.monotonic() < deadline:  # the other run is writing the file
            time.sleep(HEARTBEAT / 10)
            holder = _read(self._path)
        return errors.UserError(
            f'another run is active in {self._path.parent}: process {holder.get("pid")} on host '
            f'{holder.get("host")}. Wait for it, stop it, or pass another --workdir'
        )

    def _write(self, path: epath.Path) -> None:
        path.write_text(json.dumps(self._owner | {'beats': self._heartbeats}) + '\n')

    def _write_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT):
            self._heartbeats += 1
            try:
                holder = _read(self._path)
                if holder.get('run', self._owner['run']) != self._owner['run']:
                    _exit(
                        f'error: process {holder.get("pid")} on host {holder.get("host")} took '
                        f'over {self._path.parent} while this process stood still; this process '
                        'stops without a save. Follow the other run, or stop it first'
                    )
                self._write(self._path)
            except patience.io_errors():
                continue  # the disk is full; the next write may succeed

    def release(self) -> None:
        """Removes the lock, unless another run has taken it over."""
        self._released.set()
        self._thread.join()
        try:
            if _read(self._path).get('run') == self._owner['run']:
                self._path.unlink(missing_ok=True)
        except patience.io_errors():
            return  # the next run takes the stale lock over


def _exit(message: str) -> None:
    """Ends the process from any thread, without the saves of a regular exit."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _read(path: epath.Path) -> dict[str, Any]:
    """Returns the content of a lock; {} if the file is missing or incomplete."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_active(holder: dict[str, Any], path: epath.Path) -> bool:
    pid = holder.get('pid')
    if holder.get('host') == socket.gethostname() and isinstance(pid, int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # a process of another user
        # The number may belong to a new process by now, which does not write the file.
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT / 10)
        if not path.exists():
            return False  # released
        if _read(path) not in (holder, {}):
            return True
    return False
