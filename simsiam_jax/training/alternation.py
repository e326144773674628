"""Alternating optimization (SimSiam, section 5.2): computes targets for k steps, then trains k.

The hypothesis is that SimSiam alternates between assigning a representation to every image and
training towards it, as expectation-maximization does. SimSiam itself is k = 1.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from simsiam_jax.methods.contract import Method
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.step import TrainState, forward_views

# (state, batch) -> (state, metrics); has trace() and lower(), as compiled functions do
TrainStep = Any


class Alternating:
    """A training step whose targets come from the weights at the start of its block.

    Blocks of k steps start at multiples of k. The batches of a block are generated twice, from
    their keys. The targets are stored on the host.

    Args:
      method: The method; its network computes the targets.
      train_step: Training step that expects cached targets.
      mesh: Mesh of the devices.
      to_views: Makes the views of a device's share of a batch.
      batches: (start, stop) -> the batches of these steps.
      k: Number of steps in a block.
      last: Total number of training steps.
      dtype: Type of the targets on the host, float32 or bfloat16.
    """

    def __init__(
        self,
        method: Method,
        train_step: TrainStep,
        mesh: Mesh,
        to_views: Callable[[Any], list[Array]],
        batches: Callable[[int, int], Iterator[Any]],
        *,
        k: int,
        last: int,
        dtype: Any,
    ):
        self._train_step, self._batches, self._mesh = train_step, batches, mesh
        self._k, self._last, self._dtype = k, last, dtype
        self._cache: list[Any] = []
        self._next: int | None = None  # None until the first call

        def targets(state: TrainState, batch: Any) -> list[Array]:
            # In training mode, as in SimSiam: uses batch statistics, and discards the running ones.
            views = to_views(batch)[:2]
            outputs, _ = forward_views(method.network, state.params, state.batch_stats, views)
            return [output.z for output in outputs]

        self._targets = jax.jit(
            jax.shard_map(
                targets, mesh=mesh, in_specs=(P(), P(mesh_lib.DATA)), out_specs=P(mesh_lib.DATA)
            )
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        step = int(state.step) if self._next is None else self._next
        if not self._cache:
            stop = min((step // self._k + 1) * self._k, self._last)
            self._cache = [
                self._to_host(self._targets(state, ahead)) for ahead in self._batches(step, stop)
            ]
        target = mesh_lib.shard(self._cache.pop(0), self._mesh)
        self._next = step + 1
        return self._train_step(state, batch | {'target': target})

    def trace(self, state: TrainState, batch: Any) -> Any:
        """Traces the step, as a compiled function does, to estimate its memory."""
        target = jax.eval_shape(self._targets, state, batch)
        return self._train_step.trace(state, batch | {'target': target})

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Lowers the step, as a compiled function does."""
        return self.trace(state, batch).lower()

    def _to_host(self, targets: list[Array]) -> list[np.ndarray]:
        """Returns the rows of this process."""
        return [
            np.concatenate([np.asarray(shard.data) for shard in z.addressable_shards]).astype(
                self._dtype
            )
            for z in targets
        ]


def cache_bytes(k: int, batch_size: int, dim: int, dtype: Any) -> int:
    """Returns the memory of a block's targets, summed over all hosts."""
    return k * 2 * batch_size * dim * np.dtype(dtype).itemsize
