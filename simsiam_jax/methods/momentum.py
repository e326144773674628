"""Schedules for the EMA momentum of the target network."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array


def cosine_momentum_schedule(start: float) -> Callable[[Array], Array]:
    """Returns the rise from `start` to 1 by half a cosine over training (BYOL, section 3.3)."""
    return lambda done: 1 - (1 - start) * (jnp.cos(jnp.pi * done) + 1) / 2
