"""SwAV (Caron et al., "Unsupervised Learning by Contrasting Cluster Assignments", 2020)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax.methods import collectives
from simsiam_jax.methods.contract import Method
from simsiam_jax.methods.losses import (
    inner_products,
    l2_normalize,
    mean_over_view_pairs,
    sinkhorn,
    swapped_prediction,
)
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.heads import MLP, Prototypes
from simsiam_jax.models.network import Network, Outputs


def make(
    backbone: AnyBackbone,
    *,
    dim: int = 128,
    projector_hidden_dim: int = 2048,
    projector_layers: int = 3,
    prototypes: int = 3000,
    frozen_steps: int = 313,
    temperature: float = 0.1,
    sinkhorn_epsilon: float = 0.05,
    sinkhorn_iterations: int = 3,
    queue_size: int = 0,
    queue_start: int = 0,
    predictor: bool = False,
    predictor_hidden_dim: int = 512,
    stop_gradient: bool = True,
) -> Method:
    """Builds SwAV on a backbone; the defaults are SimSiam's reproduction, with a third layer.

    Args:
      backbone: Backbone, whose dtype and data axis the rest shares.
      dim: Width of z and the prototypes.
      projector_hidden_dim: Width of the projector's hidden layers.
      projector_layers: Number of layers of the projector.
      prototypes: Number of prototypes.
      frozen_steps: Number of first steps in which the prototypes' gradient is zero.
      temperature: Temperature of the predictions.
      sinkhorn_epsilon: Smoothness of the assignments by Sinkhorn-Knopp.
      sinkhorn_iterations: Iterations of Sinkhorn-Knopp.
      queue_size: Number of earlier images that are assigned with a small batch, for each large
        view; 0 disables the queue.
      queue_start: Step from which the queue is used, if it is full.
      predictor: Whether to add SimSiam's predictor (SimSiam, section 6.2).
      predictor_hidden_dim: Width of the predictor's hidden layer.
      stop_gradient: False removes the stop-gradient on the assignments (SimSiam, section 6.2).
    """
    axis = backbone.axis_name
    projector = MLP(
        (projector_hidden_dim,) * (projector_layers - 1) + (dim,),
        dtype=backbone.dtype,
        axis_name=axis,
    )
    head = MLP((predictor_hidden_dim, dim), dtype=backbone.dtype, axis_name=axis)

    def init_method_state(key: Array) -> dict[str, Any]:
        empty = jnp.zeros((2, queue_size, dim)) if queue_size else None
        return {'step': jnp.zeros((), jnp.int32), 'queue': empty}

    def assign(z: Float[Array, 'B D'], centers: Float[Array, 'K D']) -> Float[Array, 'B K']:
        return sinkhorn(
            inner_products(z, centers), epsilon=sinkhorn_epsilon, iterations=sinkhorn_iterations
        )

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: dict[str, Any]
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """Predicts from each view the other views' assignments, computed over the global batch."""
        step, centers = method_state['step'], online[0].prototypes
        centers = jnp.where(step < frozen_steps, jax.lax.stop_gradient(centers), centers)
        z = jnp.stack([collectives.gather(l2_normalize(view.z), axis) for view in target])
        q = jax.vmap(assign, (0, None))(z, centers)
        queue = method_state['queue']
        if queue_size:
            batch = z.shape[1]
            # Rows are 0 until images fill them, however many parts a step has.
            in_use = (step >= queue_start) & jnp.any(queue[:, -1] != 0)
            queue = jnp.concatenate([z, queue], axis=1)
            q = jnp.where(in_use, jax.vmap(assign, (0, None))(queue, centers)[:, :batch], q)
            queue = jax.lax.stop_gradient(queue[:, :queue_size])
        if stop_gradient:
            q = jax.lax.stop_gradient(q)
        codes = [collectives.local_rows(view, axis) for view in q]
        scores = [inner_products(l2_normalize(view.p), centers) for view in online]
        value = mean_over_view_pairs(
            lambda i, j: swapped_prediction(codes[j], scores[i], temperature=temperature),
            len(online),
            len(target),
        )
        return value, {'step': step, 'queue': queue}, {}

    def end_step(method_state: dict[str, Any]) -> dict[str, Any]:
        return {**method_state, 'step': method_state['step'] + 1}

    def project_params(params: dict[str, Any]) -> dict[str, Any]:
        return {**params, 'prototypes': jax.tree.map(l2_normalize, params['prototypes'])}

    network = Network(backbone, projector, head if predictor else None, Prototypes(prototypes, dim))
    return Method(
        network,
        loss,
        init_method_state=init_method_state,
        end_step=end_step,
        project_params=project_params,
    )
