"""Exact search for the nearest features, sharded over the devices."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from simsiam_jax.training import mesh as mesh_lib

DATA = mesh_lib.DATA


def search(
    bank: Float[np.ndarray, 'N D'],
    queries: Float[np.ndarray, 'Q D'],
    mesh: Mesh,
    *,
    k: int,
    chunk: int = 1024,
    block: int = 65536,
) -> tuple[Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]:
    """Returns the k largest inner products with the bank [Q, K], largest first, and their rows.

    The bank is sharded over the devices in its own dtype. Each device searches its share block by
    block, keeping the k nearest so far; then the nearest of all devices are merged.

    Args:
      bank: Features [N, D].
      queries: Features [Q, D].
      mesh: Devices that share the bank.
      k: Number of neighbors; a k above N returns all N.
      chunk: Queries per call.
      block: Rows of the bank that are compared at once.
    """
    n, k = len(bank), min(k, len(bank))
    share = -(-n // mesh.size)  # rows per device
    block = min(block, share)
    rows = np.arange(-(-share // block) * block * mesh.size)
    shards = mesh_lib.shard_global(
        (np.pad(bank, ((0, len(rows) - n), (0, 0))), np.where(rows < n, rows, -1)), mesh
    )
    program = _program(mesh, k, block)
    parts = []
    chunk = min(chunk, len(queries))
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        parts.append([np.asarray(x)[: len(part)] for x in program(padded, *shards)])
    similarity, places = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return similarity, places


@functools.lru_cache(maxsize=8)  # compiled once, not at each evaluation
def _program(mesh: Mesh, k: int, block: int) -> Callable[..., tuple[Array, Array]]:
    """Returns a function (queries, bank, rows, -1 for padding) -> the arrays of `search`."""

    def on_device(queries: Array, bank: Array, rows: Array) -> tuple[Array, Array]:
        def merge(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            part = jax.lax.dynamic_slice_in_dim(bank, start, block).astype(jnp.float32)
            places = jax.lax.dynamic_slice_in_dim(rows, start, block)
            similarity = jnp.matmul(queries, part.T, precision='highest')
            similarity = jnp.where(places >= 0, similarity, -jnp.inf)
            similarity, where = jax.lax.top_k(similarity, min(k, block))
            similarity = jnp.concatenate([best[0], similarity], 1)
            places = jnp.concatenate([best[1], places[where]], 1)
            similarity, where = jax.lax.top_k(similarity, k)
            return (similarity, jnp.take_along_axis(places, where, 1)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1)
        none = jax.lax.pcast(none, (DATA,), to='varying')
        return jax.lax.scan(merge, none, jnp.arange(0, len(bank), block))[0]

    on_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(DATA), P(DATA)),
        out_specs=(P(None, DATA), P(None, DATA)),
    )

    @jax.jit
    def merged(queries: Array, bank: Array, rows: Array) -> tuple[Array, Array]:
        similarity, places = on_devices(queries, bank, rows)
        similarity, where = jax.lax.top_k(similarity, k)
        return similarity, jnp.take_along_axis(places, where, 1)

    return merged
