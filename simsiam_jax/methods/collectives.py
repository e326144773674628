"""Batches over all devices, inside the training step; `axis_name` None is a single device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def gather(x: Array, axis_name: str | None) -> Array:
    """[b, ...] of this device -> [B, ...] of all devices, in their order, the same on each.

    Gradients go back to the devices that the rows came from.
    """
    if axis_name is None:
        return x
    # Not all_gather, whose result cannot become replicated state such as a queue.
    whole = jnp.zeros((jax.lax.axis_size(axis_name) * len(x), *x.shape[1:]), x.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, x, first_row(len(x), axis_name), 0)
    return jax.lax.psum(whole, axis_name)


def share(x: Array, axis_name: str | None) -> Array:
    """[B, ...] of all devices -> [b, ...] of this one."""
    if axis_name is None:
        return x
    rows = len(x) // jax.lax.axis_size(axis_name)
    return jax.lax.dynamic_slice_in_dim(x, first_row(rows, axis_name), rows)


def first_row(rows: int, axis_name: str | None) -> Array | int:
    """Where this device's `rows` begin among those of all devices."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
