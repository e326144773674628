"""Activations of networks."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """Returns x times the normal distribution's probability of values below x, as PyTorch's GELU.

    jax.nn.gelu without approximation has no gradient inside jax.shard_map with jax 0.12.
    """
    return x * _below(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    below = _below(x)
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return x * below, tangent * (below + x * density)


def _below(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
