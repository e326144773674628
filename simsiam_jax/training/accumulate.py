"""The gradients of a large batch from parts of it, one after the other, for less memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate_gradients(compute: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """As `compute`, over so many equal parts of a device's share of the batch.

    The mean of the parts' losses, metrics and gradients is that of the batch where the loss is a
    mean over images. BN's statistics are each part's own, and the running ones are moved by each
    part; a loss that compares the images of a batch with each other compares those of a part.

    Args:
      compute: (params, state, batch) -> ((loss, (changes, metrics)), gradients), where changes
        are fields of the state, such as batch_stats, that the next part starts from.
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

        # The first stands outside the loop: it says what types the sums have.
        (loss, (changes, metrics)), grads = compute(params, state, first)
        (changes, sums), _ = jax.lax.scan(add, (changes, (loss, metrics, grads)), rest)
        loss, metrics, grads = jax.tree.map(lambda x: x / parts, sums)
        return (loss, (changes, metrics)), grads

    return accumulated
