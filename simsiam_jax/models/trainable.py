"""A backbone as a Flax NNX module whose weights and BN statistics can be trained."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Num

from simsiam_jax.models.backbones import AnyBackbone


class TrainableBackbone(nnx.Module):
    """A backbone with its weights.

    Args:
      module: Backbone.
      variables: Its {'params', 'batch_stats'}, which are copied.

    Attributes:
      params: Weights, nnx.Param.
      batch_stats: Running statistics of BN, nnx.BatchStat.
    """

    def __init__(self, module: AnyBackbone, variables: dict[str, Any]):
        self._module = module
        self.params = nnx.data(_wrap(nnx.Param, variables['params']))
        self.batch_stats = nnx.data(_wrap(nnx.BatchStat, variables['batch_stats']))

    @property
    def features(self) -> int:
        """Returns the width D of the pooled output."""
        return self._module.features

    def __call__(self, images: Num[Array, 'B H W C'], train: bool = False) -> Float[Array, 'B D']:
        """Returns the features of normalized images; `train` updates the statistics of BN."""
        mutable = ['batch_stats'] if train else []
        x, updates = self._module.apply(self.variables, images, train, mutable=mutable)
        nnx.update(self, updates)
        return x

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the current {'params', 'batch_stats'} as arrays, as the Linen module has them."""
        return {
            name: jax.tree.map(
                lambda x: x[...], getattr(self, name), is_leaf=lambda x: isinstance(x, nnx.Variable)
            )
            for name in ('params', 'batch_stats')
        }


def _wrap(kind: type[nnx.Variable], tree: Any) -> Any:
    return jax.tree.map(lambda x: kind(x + 0), tree)
