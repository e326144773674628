"""MoCo v2 (He et al., 2019; Chen et al., 2020), its loss symmetrized."""

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
from simsiam_jax.models.heads import MLP
from simsiam_jax.models.network import Network, Outputs
from simsiam_jax.models.resnet import ResNet


def make(
    backbone: ResNet,
    *,
    dim: int = 128,
    projector_hidden_dim: int = 2048,
    temperature: float = 0.2,
    momentum: float = 0.999,
    queue_size: int = 65536,
    bn_group: int = 32,
) -> Method:
    """MoCo v2 on a backbone; the defaults are the paper's.

    Args:
      backbone: gives dtype and the data axis to the rest; its BN takes groups of images.
      dim: of z.
      projector_hidden_dim: of the hidden layer of the projector, which has no BN.
      temperature: of the softmax over a query's key and the queue.
      momentum: of the key encoder.
      queue_size: keys kept as negatives.
      bn_group: images that share BN statistics, for queries as they come and for keys shuffled
        over all devices: an image's query and key see other company. 32 is the paper's batch of
        256 on 8 GPUs; the number of devices has no part in it.
    """
    axis = backbone.axis_name
    projector = MLP((projector_hidden_dim, dim), hidden_bn=False, dtype=backbone.dtype)

    def init_method_state(key: Array) -> Float[Array, 'K D']:
        return l2_normalize(jax.random.normal(key, (queue_size, dim)))

    def loss(
        online: Sequence[Outputs], target: Sequence[Outputs], method_state: Float[Array, 'K D']
    ) -> tuple[Float[Array, ''], Any, dict[str, Array]]:
        """InfoNCE summed over both directions; then the keys of all devices join the queue."""
        value = 2 * mean_over_view_pairs(
            lambda i, j: info_nce(online[i].p, target[j].z, method_state, temperature=temperature),
            len(online),
            len(target),
        )
        keys = [collectives.gather(l2_normalize(view.z), axis) for view in target]
        return value, jnp.concatenate([*keys, method_state])[:queue_size], {}

    groups = in_groups(bn_group, axis)
    return Method(
        Network(backbone.clone(axis_name=None), projector),
        loss,
        momentum=lambda done: jnp.full_like(done, momentum),
        init_method_state=init_method_state,
        online_forward=groups,
        target_forward=shuffled(groups, axis),
    )


def in_groups(size: int, axis_name: str | None) -> ForwardFn:
    """Each `size` images in a row have BN statistics of their own; the running ones are means."""

    def through(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
        if len(view) % size:
            raise errors.UserError(
                f'method.bn_group is {size}, which does not divide the {len(view)} images of '
                'each device; change it, batch_size or the number of devices'
            )

        def group(images: Array) -> tuple[Outputs, Any]:
            return network.apply(variables, images, train=True, mutable='batch_stats')

        outputs, changed = jax.vmap(group)(view.reshape(-1, size, *view.shape[1:]))
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        stats = jax.tree.map(lambda x: x.mean(0), changed['batch_stats'])
        return outputs, stats if axis_name is None else jax.lax.pmean(stats, axis_name)

    return through


def shuffled(inner: ForwardFn, axis_name: str | None) -> ForwardFn:
    """Images change places over all devices before `inner`, and back after it (MoCo, 3.3)."""

    def through(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
        images = collectives.gather(view, axis_name)
        order = jax.random.permutation(key, len(images))
        outputs, stats = inner(network, variables, collectives.share(images[order], axis_name), key)
        back = jnp.argsort(order)
        return jax.tree.map(
            lambda x: collectives.share(collectives.gather(x, axis_name)[back], axis_name), outputs
        ), stats

    return through
