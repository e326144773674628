"""The contract of a method: a network, and a loss over the views of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from simsiam_jax.models.backbones import Backbone
from simsiam_jax.models.network import Outputs

Loss = Callable[..., tuple[Float[Array, ''], Any, dict[str, Array]]]
ForwardFn = Callable[[nn.Module, Any, Array, Array], tuple[Outputs, Any]]


def no_method_state(key: Array) -> None:
    """Returns None, the state of a method that has only weights."""


def forward(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
    """Returns the network's outputs and BN statistics for this device's images of a view."""
    outputs, updated = network.apply(
        variables, view, train=True, mutable='batch_stats', rngs={'dropout': key}
    )
    stats = updated.get('batch_stats', {})
    if 'backbone' in stats:
        stats = stats | {'backbone': mean_over_devices(network.backbone, stats['backbone'])}
    return outputs, stats


def mean_over_devices(backbone: nn.Module, batch_stats: Any) -> Any:
    """Returns running BN statistics of a backbone that are equal on all devices.

    A network that takes no axis_name has other statistics on each device. ResNets do not.
    """
    if not isinstance(backbone, Backbone) or backbone.axis_name is None:
        return batch_stats
    return jax.lax.pmean(batch_stats, backbone.axis_name)


def unchanged(method_state: Any) -> Any:
    """Returns the state of a method that counts no steps."""
    return method_state


def unconstrained(params: Any) -> Any:
    """Returns the weights unchanged: every value is allowed."""
    return params


@dataclasses.dataclass(frozen=True)
class Method:
    """A self-supervised method, as the training step uses it.

    Attributes:
      network: view -> Outputs(feature, z, p).
      loss: (online, target, method_state) -> (loss, method_state, metrics), over one device's
        batch. `online` has the Outputs of every view, `target` of the first two, the large ones.
      momentum: Share of the training that is done, 0 to 1 -> m of the target's moving average
        t <- m t + (1 - m) w over the online weights w. With None the target is the online
        network itself.
      init_method_state: key -> the state that `loss` reads and returns, identical on every device.
      end_step: Method state -> method state at the end of a step. Steps are counted here, because
        `loss` is called once for each part of an accumulated batch.
      online_forward: (network, variables, view, key) -> (Outputs, BN statistics), the forward
        pass of a view in training. The key differs for each step and view and is identical on
        every device.
      target_forward: The same for the momentum target.
      project_params: Weights -> the nearest allowed weights (prototypes of length 1, say), at the
        start and after every update.
      uses_indices: Whether `loss` takes the indices of the images as its fourth argument.
    """

    network: nn.Module
    loss: Loss
    momentum: Callable[[Array], Array] | None = None
    init_method_state: Callable[[Array], Any] = no_method_state
    end_step: Callable[[Any], Any] = unchanged
    online_forward: ForwardFn = forward
    target_forward: ForwardFn = forward
    project_params: Callable[[Any], Any] = unconstrained
    uses_indices: bool = False
