"""MoCo v2 (He et al., 2019; Chen et al., 2020) with a symmetrized loss."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax import errors
from simsiam_jax.methods import collectives
from simsiam_jax.methods.contract import ForwardFn, Method
from simsiam_jax.methods.losses import info_nce, l2_normalize, mean_over_view_pairs
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.models.heads import MLP
from simsiam_jax.models.network import Network, Outputs


def make(
    backbone: AnyBackbone,
    *,
    dim: int = 128,
    projector_hidden_dim: int = 2048,
    temperature: float = 0.2,
    momentum: float = 0.999,
    queue_size: int = 65536,
    bn_group: int = 32,
) -> Method:
    """Builds MoCo v2 on a backbone; the defaults are the paper's.

    Args:
      backbone: Backbone, whose dtype and data axis the rest shares; its BN works on groups.
      dim: Width of z.
      projector_hidden_dim: Width of the projector's hidden layer, which has no BN.
      temperature: Temperature of the softmax over a query's key and the queue.
      momentum: EMA momentum of the key encoder.
      queue_size: Number of keys kept as negatives.
      bn_group: Number of images that share BN statistics. Queries are grouped in order, keys are
        first shuffled over all devices, so an image's query and key are in different groups. 32
        corresponds to the paper's batch of 256 on 8 GPUs, for any number of devices.
    """
    axis = backbone.axis_name
    projector = MLP((projector_hidden_dim, dim), hidden_bn=False, dtype=backbone.dtype)

    def init_method_state(key: Array) -> Float[Array, 'K D']:
        return l2_normalize(jax.random.normal(key, (queue_size, dim)))

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: Float[Array, 'K D']
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """Sums InfoNCE over both directions and puts the keys of all devices into the queue."""
        value = 2 * mean_over_view_pairs(
            lambda i, j: info_nce(online[i].p, target[j].z, method_state, temperature=temperature),
            len(online),
            len(target),
        )
        keys = [collectives.gather(l2_normalize(view.z), axis) for view in target]
        return value, jnp.concatenate([*keys, method_state])[:queue_size], {}

    grouped = grouped_forward(bn_group, axis)
    return Method(
        Network(backbone.clone(axis_name=None), projector),
        loss,
        momentum=lambda done: jnp.full_like(done, momentum),
        init_method_state=init_method_state,
        online_forward=grouped,
        target_forward=shuffled_forward(grouped, axis),
    )


def grouped_forward(size: int, axis_name: str | None) -> ForwardFn:
    """Returns a forward pass with separate BN statistics for every `size` consecutive images.

    The running statistics are updated with the mean over the groups.
    """

    def forward(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
        if len(view) % size:
            raise errors.UserError(
                f'method.bn_group is {size}; expected a divisor of the {len(view)} images of each '
                'device. Set config.method.bn_group or config.batch_size, or change the devices'
            )

        def forward_group(images: Array, key: Array) -> tuple[Outputs, Any]:
            return network.apply(
                variables, images, train=True, mutable='batch_stats', rngs={'dropout': key}
            )

        groups = view.reshape(-1, size, *view.shape[1:])
        outputs, updated = jax.vmap(forward_group)(groups, jax.random.split(key, len(groups)))
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        stats = jax.tree.map(lambda x: x.mean(0), updated.get('batch_stats', {}))
        return outputs, stats if axis_name is None else jax.lax.pmean(stats, axis_name)

    return forward


def shuffled_forward(forward_fn: ForwardFn, axis_name: str | None) -> ForwardFn:
    """Returns `forward_fn` on images shuffled over all devices, outputs in order (MoCo, 3.3)."""

    def forward(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
        images = collectives.gather(view, axis_name)
        order = jax.random.permutation(key, len(images))
        shuffled = collectives.local_rows(images[order], axis_name)
        outputs, stats = forward_fn(network, variables, shuffled, key)
        inverse = jnp.argsort(order)

        def unshuffle(x: Array) -> Array:
            return collectives.local_rows(collectives.gather(x, axis_name)[inverse], axis_name)

        return jax.tree.map(unshuffle, outputs), stats

    return forward
