"""SimSiam with an explicit expectation over augmentations, without predictor (section 5.2)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simsiam_jax.methods import collectives, simsiam
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import negative_cosine
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.network import Outputs


def make(
    backbone: AnyBackbone,
    *,
    images: int,
    average: float = 0.8,
    dim: int = 2048,
    projector_layers: int = 3,
) -> Method:
    """Builds SimSiam without predictor, whose target is a moving average of each image's z.

    eta_x <- m eta_x + (1 - m) f(T'(x)) estimates the expectation over augmentations, which the
    predictor approximates in the paper's hypothesis.

    Args:
      backbone: Backbone, whose dtype and data axis the rest shares.
      images: Size of the training set; its averages are [images, dim] float32 on every device.
      average: m; with 0 the target is the other view's z alone, which collapses.
      dim: Width of z, as in SimSiam.
      projector_layers: Number of layers of the projector, as in SimSiam.
    """
    axis = backbone.axis_name

    def loss(
        online: Sequence[Outputs],
        target: Sequence[Outputs],
        method_state: Any,
        index: Int[Array, 'B'],
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """L = D(z1, eta updated by z2)/2 + D(z2, eta updated by z1)/2; stores eta of their mean."""
        z1, z2 = jax.lax.stop_gradient([view.z for view in target])
        eta = method_state[index]
        seen = jnp.any(eta != 0, axis=1, keepdims=True)

        def update(z: Float[Array, 'B D']) -> Float[Array, 'B D']:
            return jnp.where(seen, average * eta + (1 - average) * z, z)

        value = negative_cosine(online[0].z, update(z2)) + negative_cosine(online[1].z, update(z1))
        new_eta = collectives.gather(update((z1 + z2) / 2), axis)
        method_state = method_state.at[collectives.gather(index, axis)].set(new_eta)
        return value / 2, method_state, {}

    return dataclasses.replace(
        simsiam.make(backbone, dim=dim, projector_layers=projector_layers, predictor=False),
        loss=loss,
        init_method_state=lambda key: jnp.zeros((images, dim)),
        uses_indices=True,
    )
