"""The data axis of the devices, and arrays sharded or replicated over it."""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simsiam_jax import errors, paths

DATA = 'data'
_BATCH = P(DATA)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder. Call it at the start of a program.

    JAX_COMPILATION_CACHE_DIR sets another folder; JAX_ENABLE_COMPILATION_CACHE=false disables the
    cache. If a run has several processes, only the first one writes.
    """
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ and (cache := paths.cache_folder()):
        jax.config.update('jax_compilation_cache_dir', str(cache))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the given devices, or of all devices of all processes, along DATA."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(key: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Checks that every device gets an equal, non-empty share of each part of a batch.

    Args:
      key: Configuration key of the batch size, for the message.
      batch_size: Global batch size.
      mesh: Mesh of the devices.
      parts: Number of gradient accumulation steps.

    Raises:
      UserError: The batch does not divide, or `parts` is below 1.
    """
    if parts < 1:
        raise errors.UserError(f'optim.gradient_accumulation_steps is {parts}; expected 1 or more')
    unit = mesh.size * parts
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit
        valid = f'{lower} or {lower + unit}' if lower else f'{unit}'
        over = f'{mesh.size} devices' + (
            f' and optim.gradient_accumulation_steps={parts} parts' * (parts > 1)
        )
        raise errors.UserError(
            f'{key} is {batch_size}, which does not divide over {over}; use {valid}'
        )


def process_slice(batch_size: int) -> slice:
    """Returns this process's slice of a global batch; the slices of all processes make it up."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def shard(batch: Any, mesh: Mesh, spec: P = _BATCH) -> Any:
    """Returns global arrays over DATA from this process's slices [B / processes, ...].

    Args:
      batch: Arrays of this process.
      mesh: The devices.
      spec: Place of DATA in each array's shape.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # all leaves in one call
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree on every device, in new buffers: donating them does not delete `tree`."""
    sharding = NamedSharding(mesh, P())
    # Copies through the host: device_put lets one of the devices share the original's buffer.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree
    )


def shard_global(tree: Any, mesh: Mesh) -> Any:
    """Returns global arrays over DATA from leaves that every process has in full."""
    sharding = NamedSharding(mesh, P(DATA))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def prefetch(batches: Iterable[Any], mesh: Mesh, depth: int = 2) -> Iterator[Any]:
    """Yields sharded batches while the next `depth` batches are copied to the devices."""
    arriving = (shard(batch, mesh) for batch in batches)
    queue = collections.deque(itertools.islice(arriving, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(arriving, 1))
