"""Losses over embeddings, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# PyTorch's cosine similarity has the same floor under the norms.
_EPS = 1e-8


def l2_normalise(x: Float[Array, 'B D']) -> Float[Array, 'B D']:
    """x/|x| by row."""
    x = x.astype(jnp.float32)
    # The floor stands inside the root: the gradient at zero stays finite.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), _EPS**2))


def negative_cosine(p: Float[Array, 'B D'], z: Float[Array, 'B D']) -> Float[Array, '']:
    """D(p, z), mean over the batch, in [-1, 1] (SimSiam, equation 1)."""
    return -jnp.mean(jnp.sum(l2_normalise(p) * l2_normalise(z), axis=-1))
