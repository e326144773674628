"""Measures that tell a healthy run from a collapsing one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax.methods.losses import l2_normalise


def z_std(z: Float[Array, 'B D'], axis_name: str | None = None) -> Float[Array, '']:
    """Mean over channels of the standard deviation of z/|z| over the batch, times sqrt(D).

    1 for embeddings spread evenly over the sphere, 0 for collapsed ones (SimSiam, Figure 2,
    there without the factor). With `axis_name`, over the batch of all devices.
    """
    z = l2_normalise(z)
    mean = z.mean(0)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    variance = jnp.square(z - mean).mean(0)
    if axis_name is not None:
        variance = jax.lax.pmean(variance, axis_name)
    return jnp.sqrt(variance).mean() * jnp.sqrt(z.shape[-1])
