"""ResNets (He et al., 2016) equal to torchvision's: the stride in the 3x3 convolution,
explicit symmetric padding, fan-out initialization, and the last BN scale of every residual
block at zero (SimSiam, section 3)."""

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

_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `channels` in and out of both."""

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
    """1x1, 3x3, 1x1 convolutions; the last has four times `channels`."""

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
      stages: number of blocks in each stage; the resolution halves between stages.
      block: BasicBlock or Bottleneck.
      stem: 'imagenet' (7x7 stride 2, then 3x3 max-pool stride 2) or 'cifar' (3x3 stride 1).
      width: channels of the first stage; they double from stage to stage.
      zero_init_residual: the last BN scale of every block starts at 0, its output at x.
      dtype: of the computation; parameters and BN statistics are float32 always.
      axis_name: mesh axis over which BN is synchronized in training, None for a single device.
      remat: blocks are computed again in the backward pass instead of kept: the same result.
      kernels: 'plain', 'fused' for GPUs, or 'auto', what suits the device: the same result.
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
        """Width D of the pooled output."""
        return self.width * 2 ** (len(self.stages) - 1) * self.block.expansion

    @nn.compact
    def __call__(
        self, images: Num[Array | np.ndarray, 'B H W C'], train: bool = False
    ) -> Float[Array, 'B D']:
        """The feature of a batch of normalized images: mean over positions, float32."""
        fused = kernels_lib.are_fused(self.kernels)
        norm = functools.partial(
            kernels_lib.NormReLU,
            fused=fused,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        conv = functools.partial(_conv, dtype=self.dtype)
        zero = self.zero_init_residual
        last_scale = nn.initializers.zeros if zero else nn.initializers.ones
        x = jnp.asarray(images, self.dtype)
        if self.stem == 'imagenet':
            x = conv(self.width, 7, 2, name='conv1')(x)
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


def _conv(channels: int, size: int, stride: int = 1, **kwargs: Any) -> nn.Conv:
    # Explicit padding: 'SAME' is asymmetric at stride 2, PyTorch's is not.
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=_fan_out,
        conv_general_dilated=_convolve,
        **kwargs,
    )


def _convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
    size, stride = kernel.shape[0], strides[0]
    if min(x.shape[1:3]) >= size:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    # Of a map below the kernel's size XLA makes kernel and map change places, and a slow loop of
    # that on CPUs: a product of the windows instead.
    height, width = ((n - 1) // stride * stride + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = [
        padded[:, top : top + height : stride, left : left + width : stride]
        for top in range(size)
        for left in range(size)
    ]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, kernel.shape[-1])


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
    """Builds one of RESNETS; `stages` replaces its numbers of blocks (small nets for tests).

    Raises:
      UserError: unknown name, stem, dtype or kernels, or a width below one channel.
    """
    errors.check_choice('model.name', name, RESNETS)
    errors.check_choice('model.stem', stem, ('imagenet', 'cifar'))
    errors.check_choice('model.dtype', dtype, ('float32', 'bfloat16'))
    errors.check_choice('model.kernels', kernels, kernels_lib.KERNELS)
    width = round(64 * width_multiplier)
    if width < 1:
        raise errors.UserError(
            f'model.width_multiplier is {width_multiplier}: 64 times it must be at least 1'
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
    """Shapes of the backbone's {'params', 'batch_stats'}; the image's size has no part in them."""
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(backbone.init, jax.random.key(0), image)
