"""Schedules of the target's momentum."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array


def cosine_momentum_schedule(start: float) -> Callable[[Array], Array]:
    """From `start` to 1 by half a cosine over the training (BYOL, section 3.3)."""
    return lambda done: 1 - (1 - start) * (jnp.cos(jnp.pi * done) + 1) / 2
