"""BYOL (Grill et al., "Bootstrap Your Own Latent", 2020)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import mean_over_view_pairs, negative_cosine
from simsiam_jax.methods.momentum import cosine_momentum_schedule
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.heads import MLP
from simsiam_jax.models.network import Network, Outputs


def make(
    backbone: AnyBackbone,
    *,
    dim: int = 256,
    projector_hidden_dim: int = 4096,
    predictor_hidden_dim: int = 4096,
    momentum: float = 0.99,
) -> Method:
    """Builds BYOL on a backbone; the defaults are the paper's.

    Args:
      backbone: Backbone, whose dtype and BN axis the heads share.
      dim: Width of z and p.
      projector_hidden_dim: Width of the projector's hidden layer.
      predictor_hidden_dim: Width of the predictor's hidden layer.
      momentum: EMA momentum of the target at the start; it rises to 1 by a cosine.
    """

    def head(width: int) -> MLP:
        return MLP((width, dim), dtype=backbone.dtype, axis_name=backbone.axis_name)

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: Any
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """Sums ``|p/|p| - z/|z||^2`` = 2 - 2 cos over both directions, with the target's z."""
        cosine = mean_over_view_pairs(
            lambda i, j: negative_cosine(online[i].p, target[j].z), len(online), len(target)
        )
        return 2 * (2 + 2 * cosine), method_state, {}

    network = Network(backbone, head(projector_hidden_dim), head(predictor_hidden_dim))
    return Method(network, loss, cosine_momentum_schedule(momentum))
