"""The files of metrics in a workdir: metrics.jsonl and TensorBoard events."""

import json
import time
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from simsiam_jax import lazy_tf
from simsiam_jax.runtime import storage


class LineFile:
    """metrics.jsonl, a line per point. Lines that cannot be written are written with the next.

    In a bucket, nothing is sent before flush(), and then only what is new.

    Args:
      folder: Workdir of the run; exists.
      first: Lines of this step and later ones are dropped.

    Attributes:
      kept: Lines of the file at the start.
    """

    def __init__(self, folder: epath.Path, first: int):
        self._path, self._unwritten = folder / 'metrics.jsonl', b''
        lines = storage.read_text(self._path).splitlines()
        self.kept = [line for line in lines if _is_before(line, first)]
        content = ''.join(line + '\n' for line in self.kept)
        self._size = len(content.encode())
        self._remote: Any = None
        if storage.is_remote(folder):
            self._remote = lazy_tf.load().io.gfile.GFile(str(self._path), 'w')
            self._remote.write(content)
            return
        # Replacing the file at once keeps the old lines if the run is killed here.
        partial = folder / 'metrics.jsonl.partial'
        partial.write_text(content)
        partial.replace(self._path)

    def append(self, line: str) -> None:
        """Adds a line, and writes it on a disk.

        Raises:
          OSError: The disk cannot be written.
        """
        if self._remote:
            self._remote.write(line + '\n')
            return
        self._unwritten += line.encode() + b'\n'
        self.flush()

    def flush(self) -> None:
        """Writes or sends the lines that are not yet written.

        Raises:
          Exception: One of patience.io_errors().
        """
        if self._remote:
            self._remote.flush()
        elif self._unwritten:
            with open(self._path, 'r+b') as file:
                file.seek(self._size)  # over a part of a line that did not fit on a full disk
                file.write(self._unwritten)
                file.truncate()
            self._size += len(self._unwritten)
            self._unwritten = b''


class EventFile:
    """TensorBoard events, which nothing but flush() and close() sends to a bucket.

    clu's writer has no such choice: it sends at every call.

    Args:
      workdir: Workdir of the run.
      first: TensorBoard drops the points from this step on.
    """

    def __init__(self, workdir: str, first: int):
        self._tf, self._points = lazy_tf.load(), list[tuple[int, dict[str, float]]]()
        from tensorboard.compat.proto import event_pb2

        endless = 2**31 - 1
        self._writer = self._tf.summary.create_file_writer(workdir, endless, endless)
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        start = event_pb2.Event(wall_time=time.time(), step=first, session_log=session)
        # TensorBoard drops nothing at the first start in a folder, and earlier versions wrote none.
        for _ in range(2):  # tf.summary has no function for events that are not summaries
            self._tf.raw_ops.ImportEvent(
                writer=self._writer._resource, event=start.SerializeToString()
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point of each curve."""
        self._points.append((step, values))

    def image(self, name: str, pixels: Float[np.ndarray, 'H W 3']) -> None:
        """Adds a picture, values in [0, 1], to step 0."""
        with self._writer.as_default(0):
            self._tf.summary.image(name, pixels[None])

    def flush(self) -> None:
        """Writes or sends what is not yet written."""
        points, self._points = self._points, []
        with self._writer.as_default():  # leaving it flushes
            for step, values in points:
                for key, value in values.items():
                    self._tf.summary.scalar(key, value, step)

    def close(self) -> None:
        """Writes or sends what is not yet written; nothing can follow."""
        self.flush()
        self._writer.close()


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)['step'] < step
    except ValueError:  # a kill truncated the line
        return False
