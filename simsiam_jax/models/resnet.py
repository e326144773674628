"""ResNets (He et al., 2016) equal to torchvision's.

The stride is in the 3x3 convolution, padding is explicit and symmetric, initialization is fan-out,
and the last BN scale of every residual block starts at zero (SimSiam, section 3).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from simsiam_jax import errors
from simsiam_jax.models import kernels as kernels_lib

BN_MOMENTUM = 0.9  # share of a running statistic that an update keeps; PyTorch's 1 - 0.1

_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with `channels` outputs each."""

    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    last_scale: nn.initializers.Initializer

    expansion = 1

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H2 W2 D']:
        y = self.conv(self.channels, 3, self.stride, name='conv1')(x)
        y = self.norm(name='bn1')(y)
        y = self.conv(self.channels, 3, name='conv2')(y)
        return self.norm(name='bn2', scale_init=self.last_scale)(y, _shortcut(self, x, y))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the last has four times `channels` outputs."""

    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    last_scale: nn.initializers.Initializer

    expansion = 4

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H2 W2 D']:
        y = self.conv(self.channels, 1, name='conv1')(x)
        y = self.norm(name='bn1')(y)
        y = self.conv(self.channels, 3, self.stride, name='conv2')(y)
        y = self.norm(name='bn2')(y)
        y = self.conv(self.channels * self.expansion, 1, name='conv3')(y)
        return self.norm(name='bn3', scale_init=self.last_scale)(y, _shortcut(self, x, y))


def _shortcut(block: BasicBlock | Bottleneck, x: Array, y: Array) -> Array:
    if x.shape == y.shape:
        return x
    x = block.conv(y.shape[-1], 1, block.stride, name='downsample_conv')(x)
    return block.norm(name='downsample_bn', relu=False)(x)


class ResNet(nn.Module):
    """A residual network without its classifier.

    Attributes:
      stages: Number of blocks in each stage; the resolution halves between stages.
      block: BasicBlock or Bottleneck.
      stem: 'imagenet' (7x7 stride 2, then 3x3 max-pool stride 2) or 'cifar' (3x3 stride 1).
      width: Channels of the first stage; they double from stage to stage.
      zero_init_residual: Whether the last BN scale of every block starts at 0 and its output at x.
      dtype: Type of the computation; parameters and BN statistics are always float32.
      axis_name: Mesh axis over which BN is synchronized in training; None for a single device.
      remat: Whether the backward pass recomputes the blocks; the result is the same.
      kernels: 'plain', 'fused' (for GPUs) or 'auto' (by device); the result is the same.
    """

    stages: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck]
    stem: str = 'imagenet'
    width: int = 64
    zero_init_residual: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    kernels: str = 'auto'

    @property
    def features(self) -> int:
        """Returns the width D of the pooled output."""
        return self.width * 2 ** (len(self.stages) - 1) * self.block.expansion

    @nn.compact
    def __call__(
        self, images: Num[Array | np.ndarray, 'B H W C'], train: bool = False
    ) -> Float[Array, 'B D']:
        """Returns the features of a batch of normalized images: float32 means over positions."""
        fused = kernels_lib.are_fused(self.kernels)
        norm = functools.partial(
            kernels_lib.NormReLU,
            fused=fused,
            use_running_average=not train,
            momentum=BN_MOMENTUM,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        conv = functools.partial(_conv, dtype=self.dtype)
        zero = self.zero_init_residual
        last_scale = nn.initializers.zeros if zero else nn.initializers.ones
        x = jnp.asarray(images, self.dtype)
        if self.stem == 'imagenet':
            stem = kernels_lib.space_to_depth_conv if fused else _convolve
            x = conv(self.width, 7, 2, name='conv1', conv_general_dilated=stem)(x)
            x = norm(name='bn1')(x)
            x = kernels_lib.max_pool(x, fused=fused)
        else:
            x = conv(self.width, 3, name='conv1')(x)
            x = norm(name='bn1')(x)
        block = nn.remat(self.block) if self.remat else self.block
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(
                    self.width * 2**i, stride, conv, norm, last_scale, name=f'layer{i + 1}_{j}'
                )(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def _convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
    size, stride = kernel.shape[0], strides[0]
    if min(x.shape[1:3]) >= size:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    # If the map is smaller than the kernel, XLA swaps the two, which is a slow loop on CPUs. A
    # product of the windows is faster.
    height, width = ((n - 1) // stride * stride + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = [
        padded[:, top : top + height : stride, left : left + width : stride]
        for top in range(size)
        for left in range(size)
    ]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _conv(
    channels: int,
    size: int,
    stride: int = 1,
    conv_general_dilated: Callable[..., Array] = _convolve,
    **kwargs: Any,
) -> nn.Conv:
    # The padding is explicit, because 'SAME' is asymmetric at stride 2 and PyTorch's is not.
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=_fan_out,
        conv_general_dilated=conv_general_dilated,
        **kwargs,
    )


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, (3, 4, 23, 3)),
    'resnet152': (Bottleneck, (3, 8, 36, 3)),
}


def make(
    name: str = 'resnet50',
    *,
    stem: str = 'imagenet',
    width_multiplier: float = 1.0,
    stages: Sequence[int] = (),
    zero_init_residual: bool = True,
    dtype: str = 'float32',
    axis_name: str | None = None,
    remat: bool = False,
    kernels: str = 'auto',
) -> ResNet:
    """Builds one of RESNETS; the other arguments are attributes of ResNet.

    Args:
      name: One of RESNETS.
      stem: 'imagenet' or 'cifar'.
      width_multiplier: Factor on the 64 channels of the first stage.
      stages: Number of blocks in each stage, as in small nets for tests; () uses those of `name`.
      zero_init_residual: Whether the last BN scale of every block starts at 0.
      dtype: Type of the computation, 'float32' or 'bfloat16'.
      axis_name: Mesh axis over which BN is synchronized in training; None for a single device.
      remat: Whether the backward pass recomputes the blocks.
      kernels: One of kernels.KERNELS.

    Raises:
      UserError: The name, stem, dtype or kernels are unknown, or the stages or the width are
        impossible.
    """
    errors.check_choice('model.name', name, RESNETS)
    errors.check_choice('model.stem', stem, ('imagenet', 'cifar'))
    errors.check_choice('model.dtype', dtype, ('float32', 'bfloat16'))
    errors.check_choice('model.kernels', kernels, kernels_lib.KERNELS)
    if not all(isinstance(count, int) and count > 0 for count in stages):
        raise errors.UserError(
            f'model.stages is {tuple(stages)}; expected a number of blocks for each stage, such as '
            '2,2,2,2, or () for those of the name'
        )
    width = round(64 * width_multiplier)
    if width < 1:
        raise errors.UserError(
            f'model.width_multiplier is {width_multiplier}; expected 1/64 or more, for one channel'
        )
    block, blocks = RESNETS[name]
    return ResNet(
        stages=tuple(stages) or blocks,
        block=block,
        stem=stem,
        width=width,
        zero_init_residual=zero_init_residual,
        dtype=jnp.dtype(dtype),
        axis_name=axis_name,
        remat=remat,
        kernels=kernels,
    )


def abstract_variables(backbone: ResNet, channels: int) -> Any:
    """Returns shapes of the backbone's {'params', 'batch_stats'}, for images of any size."""
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(backbone.init, jax.random.key(0), image)
