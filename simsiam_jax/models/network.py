"""The network of a method: backbone, projector, predictor and prototypes."""

from typing import Any

import flax.linen as nn
import flax.struct
from jaxtyping import Array, Num


@flax.struct.dataclass
class Outputs:
    """Outputs of the network for one view.

    Attributes:
      feature: [B, C], the backbone's pooled output, which is evaluated and transferred.
      z: [B, D], the projector's output.
      p: [B, D], the predictor's output; z itself without a predictor.
      prototypes: [K, D], identical for every view; None without prototypes.
    """

    feature: Any
    z: Any
    p: Any
    prototypes: Any = None


class Network(nn.Module):
    """Encoder (backbone and projector), predictor, and prototypes to compare z with."""

    backbone: nn.Module
    projector: nn.Module
    predictor: nn.Module | None = None
    prototypes: nn.Module | None = None

    def __call__(self, view: Num[Array, 'B H W C'], train: bool = True) -> Outputs:
        feature = self.backbone(view, train)
        z = self.projector(feature, train)
        p = z if self.predictor is None else self.predictor(z, train)
        return Outputs(feature, z, p, self.prototypes() if self.prototypes else None)
