"""Alternating optimization (SimSiam, section 5.2): targets of k steps at once, then k steps.

The hypothesis is that SimSiam alternates between assigning every image its representation and
training towards it, as expectation-maximization does; SimSiam itself is k = 1.
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

# (state, batch) -> (state, metrics), with trace() and lower() as compiled functions have them
TrainStep = Any


class Alternating:
    """A training step with the targets that the weights at the beginning of its block give.

    Blocks of k steps begin at the multiples of k. Their batches are made twice, from their keys;
    the targets wait on the host.

    Args:
      train_step: with cached targets.
      batches: (start, stop) -> the batches of these steps.
      k: steps in a block.
      last: step at which the training ends.
      dtype: of the targets on the host, float32 or bfloat16.
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
        self._next: int | None = None  # the step to come

        def targets(state: TrainState, batch: Any) -> list[Array]:
            # In training mode, as SimSiam's: with the statistics of the batch, kept by nobody.
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
                self._to_host(self._targets(state, other)) for other in self._batches(step, stop)
            ]
        target = mesh_lib.shard(self._cache.pop(0), self._mesh)
        self._next = step + 1
        return self._train_step(state, batch | {'target': target})

    def trace(self, state: TrainState, batch: Any) -> Any:
        """As a compiled function's, for what the step takes."""
        target = jax.eval_shape(self._targets, state, batch)
        return self._train_step.trace(state, batch | {'target': target})

    def lower(self, state: TrainState, batch: Any) -> Any:
        return self.trace(state, batch).lower()

    def _to_host(self, targets: list[Array]) -> list[np.ndarray]:
        """This process's rows."""
        return [
            np.concatenate([np.asarray(shard.data) for shard in z.addressable_shards]).astype(
                self._dtype
            )
            for z in targets
        ]


def cache_bytes(k: int, batch_size: int, dim: int, dtype: Any) -> int:
    """What the targets of a block take on the hosts, all together."""
    return k * 2 * batch_size * dim * np.dtype(dtype).itemsize
