"""Collectives over the batch axis of the training step; `axis_name` None is a single device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def gather(x: Array, axis_name: str | None) -> Array:
    """Returns the rows [B, ...] of all devices, in device order, identical on every device.

    Gradients flow back to the devices that the rows came from.

    Args:
      x: Rows [b, ...] of this device.
      axis_name: Mesh axis of the batch.
    """
    if axis_name is None:
        return x
    # The result of all_gather cannot become replicated state such as a queue.
    rows = jnp.zeros((jax.lax.axis_size(axis_name) * len(x), *x.shape[1:]), x.dtype)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, x, first_row(len(x), axis_name), 0)
    return jax.lax.psum(rows, axis_name)


def local_rows(x: Array, axis_name: str | None) -> Array:
    """Returns this device's rows [b, ...] of the rows [B, ...] of all devices."""
    if axis_name is None:
        return x
    rows = len(x) // jax.lax.axis_size(axis_name)
    return jax.lax.dynamic_slice_in_dim(x, first_row(rows, axis_name), rows)


def first_row(rows: int, axis_name: str | None) -> Array | int:
    """Returns the index of this device's first row among all rows, with `rows` on each device."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
