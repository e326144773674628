"""What a method is: a network and a loss over the views of a batch, and nothing else."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from simsiam_jax.models.network import Outputs

Loss = Callable[
    [Sequence[Outputs], Sequence[Outputs], Any], tuple[Float[Array, ''], Any, dict[str, Array]]
]


def no_memory() -> None:
    """A method without state beside its weights."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A self-supervised method, as the training step sees it.

    Attributes:
      network: view -> Outputs(feature, z, p).
      loss: (online, target, memory) -> (loss, memory, metrics), over one device's batch;
        `online` and `target` hold the Outputs of every view.
      momentum: step -> m of the target's moving average t <- m t + (1 - m) w over the online
        weights; None: the target is the online network itself.
      init_memory: makes the state that `loss` reads and returns.
    """

    network: nn.Module
    loss: Loss
    momentum: Callable[[Array], Array] | None = None
    init_memory: Callable[[], Any] = no_memory
