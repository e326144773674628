"""The expectation over augmentations made explicit (SimSiam, section 5.2): no predictor."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simsiam_jax.methods import collectives, simsiam
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import negative_cosine
from simsiam_jax.models.network import Outputs
from simsiam_jax.models.resnet import ResNet


def make(
    backbone: ResNet,
    *,
    images: int,
    average: float = 0.8,
    dim: int = 2048,
    projector_layers: int = 3,
) -> Method:
    """SimSiam without a predictor, towards a moving average of each image's z.

    eta_x <- m eta_x + (1 - m) f(T'(x)) estimates the expectation over augmentations that the
    predictor stands for in the paper's hypothesis.

    Args:
      backbone: gives dtype and the data axis to the rest.
      images: of the training set; their averages are [images, dim] float32 on every device.
      average: m; at 0 the target is the other view's z alone, which collapses.
      dim, projector_layers: of the projector, as SimSiam's.
    """
    axis = backbone.axis_name

    def loss(
        online: Sequence[Outputs],
        target: Sequence[Outputs],
        method_state: Any,
        index: Int[Array, 'B'],
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """D(z1, eta moved by z2)/2 + D(z2, eta moved by z1)/2; eta then moves by their mean."""
        z1, z2 = jax.lax.stop_gradient([view.z for view in target])
        before = method_state[index]
        seen = jnp.any(before != 0, axis=1, keepdims=True)

        def moved(z: Float[Array, 'B D']) -> Float[Array, 'B D']:
            return jnp.where(seen, average * before + (1 - average) * z, z)

        value = negative_cosine(online[0].z, moved(z2)) + negative_cosine(online[1].z, moved(z1))
        after = collectives.gather(moved((z1 + z2) / 2), axis)
        method_state = method_state.at[collectives.gather(index, axis)].set(after)
        return value / 2, method_state, {}

    return dataclasses.replace(
        simsiam.make(backbone, dim=dim, projector_layers=projector_layers, predictor=False),
        loss=loss,
        init_method_state=lambda key: jnp.zeros((images, dim)),
        uses_indices=True,
    )
