"""SimSiam (Chen & He, "Exploring Simple Siamese Representation Learning", 2020)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax import errors
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import mean_over_view_pairs, negative_cosine, softmax_cross_entropy
from simsiam_jax.methods.momentum import cosine_momentum_schedule
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.heads import MLP
from simsiam_jax.models.network import Network, Outputs

SIMILARITIES = {'cosine': negative_cosine, 'cross_entropy': softmax_cross_entropy}

# Views (i, j) of the terms D(p_i, z_j); symmetric uses all pairs.
PAIRS = {'symmetric': (), 'asymmetric': ((0, 1),), 'two_asymmetric': ((2, 0), (3, 1))}


def make(
    backbone: AnyBackbone,
    *,
    dim: int = 2048,
    projector_layers: int = 3,
    projector_hidden_dim: int = 0,
    projector_hidden_bn: bool = True,
    projector_output_bn: bool = True,
    projector_output_affine: bool = False,
    predictor_hidden_dim: int = 512,
    predictor_hidden_bn: bool = True,
    predictor_output_bn: bool = False,
    predictor: bool = True,
    stop_gradient: bool = True,
    similarity: str = 'cosine',
    pairs: str = 'symmetric',
    momentum: float = 0.0,
) -> Method:
    """Builds SimSiam on a backbone; the defaults are the paper's baseline.

    Args:
      backbone: Backbone, whose dtype and BN axis the heads share.
      dim: Width of the projector's output z and of p (appendix B).
      projector_layers: Number of layers: 3 on ImageNet, 2 on CIFAR-10 (appendix D).
      projector_hidden_dim: Width of the hidden layers; 0 uses dim. The official code uses the
        backbone's width.
      projector_hidden_bn: Whether the projector's hidden layers have BN (Table 3).
      projector_output_bn: Whether z has BN (Table 3).
      projector_output_affine: Whether the BN on z has scale and bias.
      predictor_hidden_dim: Width of the hidden layer, the bottleneck; dim/4 in the paper.
      predictor_hidden_bn: Whether the predictor's hidden layer has BN (Table 3).
      predictor_output_bn: Whether p has BN (Table 3).
      predictor: False uses z as p, which collapses (Table 1).
      stop_gradient: False collapses (Figure 2).
      similarity: 'cosine', or 'cross_entropy' of softmaxes (section 4.5).
      pairs: 'symmetric', 'asymmetric' (p1 with z2 alone), or 'two_asymmetric' of four views, p3
        with z1 and p4 with z2 (section 4.6).
      momentum: EMA momentum at the start of a target network as in BYOL (section 6.2); 0
        disables it, and the target is the encoder itself.
    """
    projector = MLP(
        (projector_hidden_dim or dim,) * (projector_layers - 1) + (dim,),
        hidden_bn=projector_hidden_bn,
        output_bn=projector_output_bn,
        output_affine=projector_output_affine,
        dtype=backbone.dtype,
        axis_name=backbone.axis_name,
    )
    errors.check_choice('method.similarity', similarity, SIMILARITIES)
    errors.check_choice('method.pairs', pairs, PAIRS)
    head = MLP(
        (predictor_hidden_dim, dim),
        hidden_bn=predictor_hidden_bn,
        output_bn=predictor_output_bn,
        dtype=backbone.dtype,
        axis_name=backbone.axis_name,
    )

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: Any
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """L = D(p1, stopgrad(z2))/2 + D(p2, stopgrad(z1))/2, the mean over pairs for more views."""
        z = [view.z for view in target]
        if stop_gradient:
            z = jax.lax.stop_gradient(z)

        def term(i: int, j: int) -> Array:
            return SIMILARITIES[similarity](online[i].p, z[j])

        if pairs == 'symmetric':
            return mean_over_view_pairs(term, len(online), len(target)), method_state, {}
        terms = PAIRS[pairs]
        if len(online) <= max(i for i, _ in terms):
            raise errors.UserError(
                f'method.pairs is {pairs!r} with {len(online)} views; expected four views. Set '
                'config.local_crops.number=2 with the size and crop_scale of config.augment'
            )
        return sum((term(i, j) for i, j in terms), jnp.zeros(())) / len(terms), method_state, {}

    network = Network(backbone, projector, head if predictor else None)
    return Method(network, loss, cosine_momentum_schedule(momentum) if momentum else None)
