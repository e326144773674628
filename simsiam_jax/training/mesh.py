"""The one data axis, and arrays over it."""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simsiam_jax import errors

DATA = 'data'


def use_compilation_cache() -> None:
    """Compiled programs are kept in the user's cache folder; for the start of a program.

    JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=false turns it off. Of
    several processes the first one writes.
    """
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
        jax.config.update('jax_compilation_cache_dir', str(cache / 'simsiam_jax'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes, or of those given, along DATA."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(key: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises UserError unless every device gets the same, non-empty share of each part of it."""
    if parts < 1:
        raise errors.UserError(f'optim.gradient_accumulation_steps is {parts}; expected 1 or more')
    unit = mesh.size * parts
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit
        fits = f'{lower} or {lower + unit}' if lower else f'{unit}'
        over = f'{mesh.size} devices' + (
            f' and optim.gradient_accumulation_steps={parts} parts' * (parts > 1)
        )
        raise errors.UserError(
            f'{key} is {batch_size}, which does not divide over {over}; use {fits}'
        )


def process_slice(batch_size: int) -> slice:
    """This process's part of a global batch: the parts of all processes concatenate to it."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def shard(batch: Any, mesh: Mesh) -> Any:
    """Global arrays over DATA from this process's slices (leaves [B / processes, ...])."""
    sharding = NamedSharding(mesh, P(DATA))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # all leaves in one call
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree on every device, in buffers of its own (a donated copy leaves `tree` whole)."""
    sharding = NamedSharding(mesh, P())
    # By way of the host: device_put lets one of several devices share the original's buffer.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree
    )


def shard_global(tree: Any, mesh: Mesh) -> Any:
    """Global arrays over DATA from leaves that every process has whole."""
    sharding = NamedSharding(mesh, P(DATA))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def prefetch(batches: Iterable[Any], mesh: Mesh, depth: int = 2) -> Iterator[Any]:
    """Sharded batches, `depth` of them on their way to the devices while one is used."""
    arriving = (shard(batch, mesh) for batch in batches)
    queue = collections.deque(itertools.islice(arriving, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(arriving, 1))
