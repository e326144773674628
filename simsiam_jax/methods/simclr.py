"""SimCLR (Chen et al., "A Simple Framework for Contrastive Learning", 2020)."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from simsiam_jax.methods import collectives
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import l2_normalize, mean_over_view_pairs, nt_xent
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.heads import MLP
from simsiam_jax.models.network import Network, Outputs


def make(
    backbone: AnyBackbone,
    *,
    dim: int = 128,
    projector_hidden_dim: int = 2048,
    projector_layers: int = 3,
    projector_output_bn: bool = True,
    temperature: float = 0.1,
    predictor: bool = False,
    predictor_hidden_dim: int = 512,
    stop_gradient: bool = False,
) -> Method:
    """Builds SimCLR on a backbone; the defaults are SimSiam's reproduction, with a third layer.

    Args:
      backbone: Backbone, whose dtype and data axis the rest shares.
      dim: Width of z.
      projector_hidden_dim: Width of the projector's hidden layers.
      projector_layers: Number of layers of the projector.
      projector_output_bn: Whether z has BN.
      temperature: Temperature of the softmax over all other views.
      predictor: Whether to add SimSiam's predictor (SimSiam, section 6.2).
      predictor_hidden_dim: Width of the predictor's hidden layer.
      stop_gradient: Whether to add SimSiam's stop-gradient (SimSiam, section 6.2).
    """
    axis = backbone.axis_name
    projector = MLP(
        (projector_hidden_dim,) * (projector_layers - 1) + (dim,),
        output_bn=projector_output_bn,
        dtype=backbone.dtype,
        axis_name=axis,
    )
    head = MLP((predictor_hidden_dim, dim), dtype=backbone.dtype, axis_name=axis)

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: Any
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """Computes NT-Xent against both views of all images on all devices."""
        z = [collectives.gather(l2_normalize(view.z), axis) for view in online]
        if stop_gradient:
            z = jax.lax.stop_gradient(z)
        first_row = collectives.first_row(len(online[0].z), axis)

        def pair(i: int, j: int) -> Array:
            return nt_xent(online[i].p, z[i], z[j], temperature=temperature, first_row=first_row)

        return mean_over_view_pairs(pair, len(online), len(target)), method_state, {}

    return Method(Network(backbone, projector, head if predictor else None), loss)
