"""Imports TensorFlow only when TensorBoard, TFDS, buckets or colors on the host need it."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from simsiam_jax import errors


@functools.cache
def load() -> Any:
    """Returns the module, kept off the accelerators, because they and their memory belong to JAX.

    Raises:
      UserError: TensorFlow is not installed.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Flushing a file in a bucket sends what is new, where TensorFlow would send the whole file.
    os.environ.setdefault('GCS_APPEND_MODE', 'compose')
    try:
        with _quiet():
            import tensorflow as tf

            tf.config.set_visible_devices([], 'GPU')
            tf.config.set_visible_devices([], 'TPU')
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f'{error.name} is not installed; TensorBoard, TFDS, gs:// and data.on_device=none need '
            f'it. Run pip install {error.name}, or set log.tensorboard=False, a local data.source '
            'and data.on_device=color'
        ) from error
    return tf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TensorFlow's C++ code prints start-up lines before any log level applies.
    sys.stderr.flush()
    original = os.dup(2)
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)
