"""SwAV (Caron et al., "Unsupervised Learning by Contrasting Cluster Assignments", 2020)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax.methods import collectives
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import (
    cross_entropy,
    inner_products,
    l2_normalise,
    over_pairs,
    sinkhorn,
)
from simsiam_jax.models.heads import MLP, Prototypes
from simsiam_jax.models.network import Network, Outputs
from simsiam_jax.models.resnet import ResNet


def make(
    backbone: ResNet,
    *,
    dim: int = 128,
    projector_width: int = 2048,
    projector_layers: int = 3,
    prototypes: int = 3000,
    frozen_steps: int = 313,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: int = 0,
    queue_start: int = 0,
    predictor: bool = False,
    predictor_width: int = 512,
    stop_gradient: bool = True,
) -> Method:
    """SwAV on a backbone; the defaults are SimSiam's reproduction, with a third layer.

    Args:
      backbone: gives dtype and the data axis to the rest.
      dim: of z and the prototypes.
      projector_width: of the projector's hidden layers.
      prototypes: their number.
      frozen_steps: at first, in which the prototypes' gradient is zero.
      temperature: of the predictions.
      epsilon, iterations: of Sinkhorn-Knopp.
      queue: earlier images that are assigned along with a small batch, for each large view.
      queue_start: step from which it is used, once it is full.
      predictor, stop_gradient: SimSiam's, added or taken away (SimSiam, section 6.2).
      predictor_width: of the predictor's hidden layer.
    """
    axis = backbone.axis_name
    projector = MLP(
        (projector_width,) * (projector_layers - 1) + (dim,), dtype=backbone.dtype, axis_name=axis
    )
    head = MLP((predictor_width, dim), dtype=backbone.dtype, axis_name=axis)

    def init_memory(key: Array) -> dict[str, Any]:
        empty = jnp.zeros((2, queue, dim)) if queue else None
        return {'step': jnp.zeros((), jnp.int32), 'queue': empty}

    def assign(z: Float[Array, 'B D'], centres: Float[Array, 'K D']) -> Float[Array, 'B K']:
        return sinkhorn(inner_products(z, centres), epsilon=epsilon, iterations=iterations)

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], memory: dict[str, Any]
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """Each view predicts the assignments of the others, made over the global batch."""
        step, centres = memory['step'], online[0].prototypes
        centres = jnp.where(step < frozen_steps, jax.lax.stop_gradient(centres), centres)
        z = jnp.stack([collectives.gather(l2_normalise(view.z), axis) for view in target])
        q = jax.vmap(assign, (0, None))(z, centres)
        kept = memory['queue']
        if queue:
            batch = z.shape[1]
            kept = jnp.concatenate([z, kept], axis=1)
            full = step >= max(queue_start, -(-queue // batch))
            q = jnp.where(full, jax.vmap(assign, (0, None))(kept, centres)[:, :batch], q)
            kept = jax.lax.stop_gradient(kept[:, :queue])
        if stop_gradient:
            q = jax.lax.stop_gradient(q)
        codes = [collectives.share(view, axis) for view in q]
        scores = [inner_products(l2_normalise(view.p), centres) for view in online]
        value = over_pairs(
            lambda i, j: cross_entropy(codes[j], scores[i], temperature=temperature),
            len(online),
            len(target),
        )
        return value, {'step': step + 1, 'queue': kept}, {}

    def constrain(params: dict[str, Any]) -> dict[str, Any]:
        return {**params, 'prototypes': jax.tree.map(l2_normalise, params['prototypes'])}

    network = Network(backbone, projector, head if predictor else None, Prototypes(prototypes, dim))
    return Method(network, loss, init_memory=init_memory, constrain=constrain)
