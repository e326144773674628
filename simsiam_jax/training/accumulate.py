"""Gradient accumulation: computes the gradients of a batch in parts, to use less memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate_gradients(compute: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Returns `compute` that runs over equal parts of a device's batch, one after the other.

    If the loss is a mean over images, the mean of the parts' losses, metrics and gradients equals
    the batch's. BN uses the statistics of each part, and each part updates the running statistics.
    A loss that compares the images of a batch only compares the images of a part.

    Args:
      compute: (params, state, batch) -> ((loss, (changes, metrics)), gradients). `changes` are
        fields of the state, such as batch_stats, that the next part starts from.
      parts: Number of parts; 1 returns `compute` unchanged.
    """
    if parts == 1:
        return compute

    def accumulated(params: Any, state: Any, batch: Any) -> Any:
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first, rest = jax.tree.map(lambda x: x[0], split), jax.tree.map(lambda x: x[1:], split)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            changes, sums = carry
            (loss, (changes, metrics)), grads = compute(
                params, dataclasses.replace(state, **changes), part
            )
            return (changes, jax.tree.map(jnp.add, sums, (loss, metrics, grads))), None

        # The first part runs outside the loop because its results set the types of the sums.
        (loss, (changes, metrics)), grads = compute(params, state, first)
        (changes, sums), _ = jax.lax.scan(add, (changes, (loss, metrics, grads)), rest)
        loss, metrics, grads = jax.tree.map(lambda x: x / parts, sums)
        return (loss, (changes, metrics)), grads

    return accumulated
