"""ConvNeXts (Liu et al., "A ConvNet for the 2020s", 2022) equal to timm's."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax import errors
from simsiam_jax.models.activations import gelu

_init = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """A depthwise 7x7 convolution and an MLP at each position, scaled and added to the input."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        channels = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_init)
        y = nn.Conv(
            channels,
            (7, 7),
            padding=3,
            feature_group_count=channels,
            dtype=self.dtype,
            kernel_init=_init,
            conv_general_dilated=_depthwise,
            name='conv_dw',
        )(x)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(y)
        y = gelu(dense(4 * channels, name='fc1')(y))
        y = dense(channels, name='fc2')(y)
        gamma = self.param('gamma', nn.initializers.constant(1e-6), (channels,))
        return x + y * gamma.astype(self.dtype)


class ConvNeXt(nn.Module):
    """A ConvNeXt without its classifier.

    Attributes:
      depths: Number of blocks in each stage; the resolution halves between stages.
      widths: Channels of each stage; the last is the width D of the features.
      patch_size: Side of the patches of the first convolution, pixels.
      dtype: Type of the computation; parameters are always float32.
      remat: Whether the backward pass recomputes the blocks; the result is the same.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int = 4
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, 'B H W C'], train: bool = False) -> Float[Array, 'B D']:
        """Returns the features of a batch of normalized images. Training computes the same."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        x = self._patches(self.widths[0], self.patch_size, 'stem_conv')(images.astype(self.dtype))
        x = norm(name='stem_norm')(x)
        block = nn.remat(Block) if self.remat else Block
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if i:
                x = norm(name=f'stages_{i}_downsample_norm')(x)
                x = self._patches(width, 2, f'stages_{i}_downsample_conv')(x)
            for j in range(depth):
                x = block(self.dtype, name=f'stages_{i}_blocks_{j}')(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.LayerNorm(epsilon=1e-6, name='head_norm')(x)

    def _patches(self, width: int, size: int, name: str) -> nn.Conv:
        return nn.Conv(
            width,
            (size, size),
            strides=size,
            padding='VALID',
            dtype=self.dtype,
            kernel_init=_init,
            name=name,
        )


def _depthwise(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
    # On a CPU, XLA is slow if the map is smaller than the kernel: on maps of 4x4 the sum of shifted
    # products takes a quarter of its time. On maps of 8x8 both take the same time, and the sum
    # takes longer to compile.
    if jax.default_backend() != 'cpu' or min(x.shape[1:3]) >= kernel.shape[0]:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    products = [
        padded[:, top : top + height, left : left + width] * kernel[top, left, 0]
        for top in range(kernel.shape[0])
        for left in range(kernel.shape[1])
    ]
    return sum(products[1:], products[0])


def convnext(
    *,
    depths: Sequence[int] = (3, 3, 9, 3),
    widths: Sequence[int] = (96, 192, 384, 768),
    patch_size: int = 4,
    image_size: int = 224,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> ConvNeXt:
    """Builds a ConvNeXt of any size; the arguments are the attributes of ConvNeXt.

    Args:
      depths: Number of blocks in each stage.
      widths: Channels of each stage.
      patch_size: Side of the patches of the first convolution, pixels.
      image_size: Side of the images, to check that the last stage has a position.
      dtype: Type of the computation.
      remat: Whether the backward pass recomputes the blocks.

    Raises:
      UserError: The numbers of depths and widths differ, or the images are too small.
    """
    if not depths or len(depths) != len(widths):
        raise errors.UserError(
            f'model.arguments.depths has {len(depths)} stages and widths {len(widths)}; expected '
            'the same number, such as 3,3,9,3 and 96,192,384,768'
        )
    if image_size < patch_size * 2 ** (len(depths) - 1):
        raise errors.UserError(
            f'augment.size is {image_size}, too small for patches of {patch_size} and '
            f'{len(depths)} stages; expected {patch_size * 2 ** (len(depths) - 1)} or more. Set '
            'model.arguments.patch_size'
        )
    return ConvNeXt(tuple(depths), tuple(widths), patch_size, dtype, remat)


SIZES: dict[str, dict[str, Any]] = {
    'convnext_atto': {'depths': (2, 2, 6, 2), 'widths': (40, 80, 160, 320)},
    'convnext_femto': {'depths': (2, 2, 6, 2), 'widths': (48, 96, 192, 384)},
    'convnext_pico': {'depths': (2, 2, 6, 2), 'widths': (64, 128, 256, 512)},
    'convnext_nano': {'depths': (2, 2, 8, 2), 'widths': (80, 160, 320, 640)},
    'convnext_tiny': {'depths': (3, 3, 9, 3), 'widths': (96, 192, 384, 768)},
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(convnext, **sizes) for name, sizes in SIZES.items()
}
