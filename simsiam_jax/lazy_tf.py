"""TensorFlow, imported only where image files, TensorBoard or buckets need it."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from simsiam_jax import errors


@functools.cache
def load() -> Any:
    """The module, kept off the accelerators: they and their memory belong to JAX.

    Raises:
      UserError: it is not installed.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    try:
        with _quiet():
            import tensorflow as tf

            tf.config.set_visible_devices([], 'GPU')
            tf.config.set_visible_devices([], 'TPU')
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f'{error.name} is not installed, and image files, TensorBoard and gs:// need it; '
            f'pip install {error.name}, or use data.source=digits, log.tensorboard=False and disks'
        ) from error
    return tf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Its start-up lines come from C++ before any log level counts.
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
