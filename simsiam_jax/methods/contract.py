"""What a method is: a network and a loss over the views of a batch, and nothing else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from simsiam_jax.models.network import Outputs

Loss = Callable[..., tuple[Float[Array, ''], Any, dict[str, Array]]]
ForwardFn = Callable[[nn.Module, Any, Array, Array], tuple[Outputs, Any]]


def no_method_state(key: Array) -> None:
    """A method without state beside its weights."""


def forward(network: nn.Module, variables: Any, view: Array, key: Array) -> tuple[Outputs, Any]:
    """The network as it is, on this device's share of a view."""
    outputs, changed = network.apply(variables, view, train=True, mutable='batch_stats')
    return outputs, changed.get('batch_stats', {})


def any_params(params: Any) -> Any:
    """Weights that may be anything."""
    return params


@dataclasses.dataclass(frozen=True)
class Method:
    """A self-supervised method, as the training step sees it.

    Attributes:
      network: view -> Outputs(feature, z, p).
      loss: (online, target, method_state) -> (loss, method_state, metrics), over one device's
        batch; `online` has the Outputs of every view, `target` of the first two, the large ones.
      momentum: share of the training that is done, 0 to 1 -> m of the target's moving average
        t <- m t + (1 - m) w over the online weights; None: the target is the online network
        itself.
      init_method_state: key -> the state that `loss` reads and returns, the same on every device.
      pass_online, pass_target: (network, variables, view, key) -> (Outputs, BN statistics), a
        view's way through the network in training; the key is another for each step and view and
        the same on every device.
      constrain: weights -> the nearest that are allowed (prototypes of length 1, say), at the
        start and after every update.
      by_image: `loss` is also given the indices of the images, as its fourth argument.
    """

    network: nn.Module
    loss: Loss
    momentum: Callable[[Array], Array] | None = None
    init_method_state: Callable[[Array], Any] = no_method_state
    online_forward: ForwardFn = forward
    target_forward: ForwardFn = forward
    project_params: Callable[[Any], Any] = any_params
    uses_indices: bool = False
