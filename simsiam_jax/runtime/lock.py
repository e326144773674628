"""One run at a time in a workdir."""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from simsiam_jax import errors
from simsiam_jax.runtime import storage

NAME = 'lock.json'
BEAT = 5.0  # seconds
_PATIENCE = 3 * BEAT


class Lock:
    """Holds the workdir by a file that names host and process, until release() or death.

    The file is written anew every BEAT seconds; one whose process is gone, or of another host
    whose beat stands still, is taken over.

    Raises:
      UserError: another run is active there.
      OSError: the workdir cannot be written; of a bucket, one of storage.io_errors().
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / NAME
        self._me = {'host': socket.gethostname(), 'pid': os.getpid(), 'run': uuid.uuid4().hex}
        self._beats = 0
        storage.mkdirs(workdir)
        if not storage.is_remote(workdir):
            self._take(self._path)
        else:  # a bucket cannot refuse the second of two at once
            holder = _read(self._path)
            if holder and _is_active(holder, self._path):
                raise self._refusal(holder)
            self._write(self._path)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _take(self, path: epath.Path) -> None:
        """Creates the file; of several at once one does, the others raise UserError."""
        try:
            open(path, 'x').close()
        except FileExistsError:
            self._remove_dead(path)
            self._take(path)
        else:
            self._write(path)

    def _remove_dead(self, path: epath.Path) -> None:
        try:
            holder, seen = _read(path), os.stat(path).st_mtime_ns
            if _is_active(holder, path):
                raise self._refusal(_read(path) or holder)
            # Only who holds the file named after this state of the lock may remove it: who found
            # the same holder dead but comes later would remove the lock of who has come first.
            claim = path.with_name(f'{path.name}.{seen}')
            self._take(claim)
            try:
                if os.stat(path).st_mtime_ns != seen:
                    raise self._refusal(_read(path))
                path.unlink()
            finally:
                claim.unlink()
        except FileNotFoundError:
            return  # released, or removed, in the meantime

    def _refusal(self, holder: dict[str, Any]) -> errors.UserError:
        deadline = time.monotonic() + _PATIENCE
        while not holder and time.monotonic() < deadline:  # it is being written
            time.sleep(BEAT / 10)
            holder = _read(self._path)
        return errors.UserError(
            f'another run is active in {self._path.parent}: process {holder.get("pid")} on host '
            f'{holder.get("host")}; wait for it, end it, or give another --workdir'
        )

    def _write(self, path: epath.Path) -> None:
        path.write_text(json.dumps(self._me | {'beats': self._beats}) + '\n')

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self._beats += 1
            try:
                self._write(self._path)
            except storage.io_errors():
                continue  # a full disk: the next beat may find room

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        try:
            if _read(self._path).get('run') == self._me['run']:
                self._path.unlink(missing_ok=True)
        except storage.io_errors():
            return  # it will be found to be stale


def _read(path: epath.Path) -> dict[str, Any]:
    """{} where there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_active(holder: dict[str, Any], path: epath.Path) -> bool:
    pid = holder.get('pid')
    if holder.get('host') == socket.gethostname() and isinstance(pid, int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # of another user
        # The number may have gone to another process by now; then nothing beats.
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        if not path.exists():
            return False  # released
        if _read(path) not in (holder, {}):
            return True
    return False
