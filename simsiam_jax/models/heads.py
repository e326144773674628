"""Heads: projection and prediction MLPs (SimSiam, section 3) and prototypes (SwAV)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simsiam_jax.models import resnet

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default; with std 0.01 training may not converge.
_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class MLP(nn.Module):
    """Fully connected layers with ReLUs between them.

    Attributes:
      widths: Width of every layer; the last is the output.
      hidden_bn: Whether there is BN before each ReLU.
      output_bn: Whether there is BN on the output, which never has a ReLU.
      output_affine: Whether the output's BN has scale and bias.
      dtype: Type of the computation; the output is always float32.
      axis_name: Mesh axis over which BN is synchronized; None for a single device.
    """

    widths: tuple[int, ...]
    hidden_bn: bool = True
    output_bn: bool = False
    output_affine: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B C'], train: bool) -> Float[Array, 'B D']:
        for i, width in enumerate(self.widths, 1):
            last = i == len(self.widths)
            bn = self.output_bn if last else self.hidden_bn
            x = nn.Dense(
                width,
                use_bias=not bn,
                dtype=self.dtype,
                kernel_init=_uniform,
                bias_init=_uniform_bias(x.shape[-1]),
                name=f'fc{i}',
            )(x)
            if bn:
                affine = not last or self.output_affine
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=resnet.BN_MOMENTUM,
                    epsilon=1e-5,
                    use_scale=affine,
                    use_bias=affine,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'bn{i}',
                )(x)
            if not last:
                x = nn.relu(x)
        return x.astype(jnp.float32)


class Prototypes(nn.Module):
    """Centers of `count` clusters in `dim` dimensions."""

    count: int
    dim: int

    @nn.compact
    def __call__(self) -> Float[Array, 'K D']:
        return self.param('centers', nn.initializers.normal(1.0), (self.count, self.dim))


def _uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    limit = 1 / np.sqrt(fan_in)

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
