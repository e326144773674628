"""A view's way through the network: backbone, projector, predictor."""

from typing import Any

import flax.linen as nn
import flax.struct
from jaxtyping import Array, Num


@flax.struct.dataclass
class Outputs:
    """What the network makes of one view.

    Attributes:
      feature: [B, C], the backbone's pooled output, what is evaluated and transferred.
      z: [B, D], the projector's output.
      p: [B, D], the predictor's output, z itself where there is no predictor.
      prototypes: [K, D], the same for every view; None where there are none.
    """

    feature: Any
    z: Any
    p: Any
    prototypes: Any = None


class Network(nn.Module):
    """Encoder (backbone and projector), predictor, and prototypes that z is compared with."""

    backbone: nn.Module
    projector: nn.Module
    predictor: nn.Module | None = None
    prototypes: nn.Module | None = None

    def __call__(self, view: Num[Array, 'B H W C'], train: bool = True) -> Outputs:
        feature = self.backbone(view, train)
        z = self.projector(feature, train)
        p = z if self.predictor is None else self.predictor(z, train)
        return Outputs(feature, z, p, self.prototypes() if self.prototypes else None)
