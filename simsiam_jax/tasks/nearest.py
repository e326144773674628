"""A bank of features sharded over the devices, and the exact search for nearest neighbors in it.

No process holds the whole bank: features stay on the devices that computed them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from simsiam_jax import errors
from simsiam_jax.tasks.features import CropLoader, Encode, encode_normalized
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.training import mesh as mesh_lib

DATA = mesh_lib.DATA
_BLOCK = 65536  # rows of the bank on a device that are compared at once


@dataclasses.dataclass(frozen=True)
class Bank:
    """Features of images, sharded over the devices.

    Attributes:
      features: Features [R, D], l2-normalized.
      rows: Positions [R] of the images in their source; -1 for rows without an image.
      mesh: Devices that share the bank.
      block: Rows that a device compares at once, a divisor of its share.
    """

    features: Array
    rows: Array
    mesh: Mesh
    block: int

    def nearest(self, queries: Float[Array | np.ndarray, 'Q D'], k: int) -> tuple[Array, Array]:
        """Returns the k largest inner products [Q, k], largest first, and their images' positions.

        Each device searches its share block by block, keeping the k nearest so far; then the
        nearest of all devices are merged. The bank must have at least k images.
        """
        return _search(self.mesh, k, self.block)(queries, self.features, self.rows)


def from_host(bank: Float[np.ndarray, 'N D'], mesh: Mesh, block: int = _BLOCK) -> Bank:
    """Returns the bank of features that every process has in full.

    Args:
      bank: Features [N, D] in the type of the bank.
      mesh: Devices that share the bank.
      block: Most rows that a device compares at once.
    """
    share, block = _share(-(-len(bank) // mesh.size), block)
    sharding = NamedSharding(mesh, P(DATA))

    def part(index: Any) -> np.ndarray:
        own = bank[index[0]]
        return np.pad(own, ((0, share - len(own)), (0, 0)))

    count = share * mesh.size
    features = jax.make_array_from_callback((count, bank.shape[1]), sharding, part)
    rows = np.where(np.arange(count) < len(bank), np.arange(count), -1).astype(np.int32)
    return Bank(features, mesh_lib.shard_global(rows, mesh), mesh, block)


def extract(
    encode: Encode, variables: Any, source: ImageSet, loader: CropLoader, dtype: Any
) -> tuple[Bank, Int[np.ndarray, 'N']]:
    """Returns the bank of a source's images, and their labels by position.

    Args:
      encode: Function (variables, images [B, S, S, C]) -> features [B, D].
      variables: Variables of the network, on the devices of the loader.
      source: Images; those that cannot be read are not in the bank.
      loader: Loader of the crops.
      dtype: Type of the features in the bank.

    Raises:
      UserError: None of the images can be read.
    """
    mesh = loader.mesh
    sharded, replicated = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())
    run = jax.jit(encode_normalized, static_argnums=0, out_shardings=sharded)
    gather = jax.jit(lambda x: x, out_shardings=replicated)
    add = _adder(mesh)
    labels = np.full(len(source), -1)
    bank: Bank | None = None
    found = 0
    for number, (images, *where) in enumerate(loader.batches(source)):
        x = run(encode, variables, images)
        if bank is None:
            local = len(x) // mesh.size
            share, block = _share(-(-len(source) // len(x)) * local, _BLOCK)
            bank = _empty(share * mesh.size, x.shape[1], mesh, block, dtype)
        features, rows = add(bank.features, bank.rows, x, where[1], number * local)
        bank = dataclasses.replace(bank, features=features, rows=rows)
        classes, indices = jax.device_get(gather(where))
        readable = indices >= 0
        labels[indices[readable]] = classes[readable]
        found += int(readable.sum())
    if bank is None or not found:
        raise errors.UserError('none of the images to evaluate can be read')
    return bank, labels


def _share(rows: int, block: int) -> tuple[int, int]:
    """Returns a device's rows, filled up to a multiple of the block, and the block."""
    block = min(block, rows)
    return -(-rows // block) * block, block


def _empty(count: int, width: int, mesh: Mesh, block: int, dtype: Any) -> Bank:
    make = jax.jit(
        lambda: (jnp.zeros((count, width), dtype), jnp.full(count, -1, jnp.int32)),
        out_shardings=NamedSharding(mesh, P(DATA)),
    )
    features, rows = make()
    return Bank(features, rows, mesh, block)


@functools.lru_cache(maxsize=8)
def _adder(mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """Returns a function that writes a batch to the rows from `start` of each device's share."""

    def on_device(features: Array, rows: Array, x: Array, indices: Array, start: Array) -> Any:
        features = jax.lax.dynamic_update_slice(features, x.astype(features.dtype), (start, 0))
        return features, jax.lax.dynamic_update_slice(rows, indices.astype(rows.dtype), (start,))

    specs = P(DATA), P(DATA), P(DATA), P(DATA), P()
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(P(DATA), P(DATA)))
    return jax.jit(sharded, donate_argnums=(0, 1))


@functools.lru_cache(maxsize=8)  # compiled once, not at each evaluation
def _search(mesh: Mesh, k: int, block: int) -> Callable[..., tuple[Array, Array]]:
    """Returns a function (queries, bank, rows, -1 for padding) -> the arrays of `nearest`."""

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
    def search(queries: Array, bank: Array, rows: Array) -> tuple[Array, Array]:
        similarity, places = on_devices(queries, bank, rows)
        similarity, where = jax.lax.top_k(similarity, k)
        return similarity, jnp.take_along_axis(places, where, 1)

    return search


def search(
    bank: Float[np.ndarray, 'N D'],
    queries: Float[np.ndarray, 'Q D'],
    mesh: Mesh,
    *,
    k: int,
    chunk: int = 1024,
    block: int = _BLOCK,
) -> tuple[Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]:
    """Returns the k largest inner products with the bank [Q, K], largest first, and their rows.

    Args:
      bank: Features [N, D]; each device gets a share, in their type.
      queries: Features [Q, D].
      mesh: Devices that share the bank.
      k: Number of neighbors; a k above N returns all N.
      chunk: Queries per call.
      block: Rows of the bank that are compared at once.
    """
    shared = from_host(bank, mesh, block)
    parts = []
    chunk = min(chunk, len(queries))
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        found = shared.nearest(padded, min(k, len(bank)))
        parts.append([np.asarray(x)[: len(part)] for x in found])
    similarity, places = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return similarity, places
