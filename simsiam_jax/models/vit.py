"""Vision Transformers (Dosovitskiy et al., 2021) equal to timm's."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simsiam_jax import errors
from simsiam_jax.models.activations import gelu

_init = nn.initializers.truncated_normal(0.02)
POOLS = ('token', 'avg')


class Block(nn.Module):
    """Attention and MLP with LayerNorm before each and a residual connection around each."""

    heads: int
    hidden_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_init)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        width = x.shape[-1]
        qkv = dense(3 * width, name='qkv')(norm(name='norm1')(x))
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, width // self.heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(width, name='proj')(y)
        y = dense(self.hidden_dim, name='fc1')(norm(name='norm2')(x))
        return x + dense(width, name='fc2')(gelu(y))


class ViT(nn.Module):
    """A Vision Transformer without its classifier.

    Attributes:
      width: Width D of the tokens and of the features.
      depth: Number of blocks.
      heads: Number of attention heads.
      patch_size: Side of a patch, pixels.
      image_size: Side of the images that the position embedding is for; it is interpolated for
        other sizes.
      mlp_ratio: Width of the MLP's hidden layer over that of the tokens.
      pool: Feature: 'token' is the class token, 'avg' the mean over the patches.
      frozen_patch_embedding: Keeps the random projection of the patches (Chen et al., "An Empirical
        Study of Training Self-Supervised Vision Transformers", 2021): the optimizer does not
        update modules named frozen_*.
      dtype: Type of the computation; parameters are always float32.
      remat: Whether the backward pass recomputes the blocks; the result is the same.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: float | int = 4.0
    pool: str = 'token'
    frozen_patch_embedding: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, 'B H W C'], train: bool = False) -> Float[Array, 'B D']:
        """Returns the features of a batch of normalized images. Training computes the same."""
        size = self.patch_size
        if images.shape[1] % size or images.shape[2] % size:
            raise errors.UserError(
                f'images of {images.shape[1]}x{images.shape[2]} do not divide into patches of '
                f'{size}. Set model.arguments.patch_size, or augment.size to a multiple of it'
            )
        frozen = self.frozen_patch_embedding
        x = nn.Conv(
            self.width,
            (size, size),
            strides=size,
            padding='VALID',
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
            name='frozen_patch_embed' if frozen else 'patch_embed',
        )(images.astype(self.dtype))
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, self.width))
        x = jnp.concatenate([token, x], axis=1) + self._positions(grid).astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        hidden_dim = round(self.width * self.mlp_ratio)
        for i in range(self.depth):
            x = block(self.heads, hidden_dim, self.dtype, name=f'blocks_{i}')(x)
        if self.pool == 'avg':
            x = jnp.mean(x[:, 1:], axis=1, dtype=jnp.float32)
            return nn.LayerNorm(epsilon=1e-6, name='fc_norm')(x)
        return nn.LayerNorm(epsilon=1e-6, name='norm')(x[:, 0].astype(jnp.float32))

    def _positions(self, grid: tuple[int, ...]) -> Float[Array, '1 N D']:
        """Returns the position embedding, interpolated for another number of patches."""
        side = self.image_size // self.patch_size
        positions = self.param('pos_embed', _init, (1, 1 + side * side, self.width))
        if grid == (side, side):
            return positions
        patches = positions[:, 1:].reshape(1, side, side, self.width)
        patches = jax.image.resize(patches, (1, *grid, self.width), 'bicubic')
        return jnp.concatenate([positions[:, :1], patches.reshape(1, -1, self.width)], axis=1)


def vit(
    *,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch_size: int = 16,
    mlp_ratio: float | int = 4.0,
    pool: str = 'token',
    frozen_patch_embedding: bool = False,
    image_size: int = 224,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> ViT:
    """Builds a ViT of any size; the arguments are the attributes of ViT.

    Raises:
      UserError: The sizes do not divide, or `pool` is unknown.
    """
    errors.check_choice('model.arguments.pool', pool, POOLS)
    for key, value, unit, total in (
        ('patch_size', patch_size, 'augment.size', image_size),
        ('heads', heads, 'the width', width),
    ):
        if value < 1 or total % value:
            raise errors.UserError(
                f'model.arguments.{key} is {value}; expected a divisor of {unit}, {total}'
            )
    return ViT(
        width=width,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        image_size=image_size,
        mlp_ratio=mlp_ratio,
        pool=pool,
        frozen_patch_embedding=frozen_patch_embedding,
        dtype=dtype,
        remat=remat,
    )


# timm's vit_tiny_patch16_224 and so on, with any patch size.
SIZES: dict[str, dict[str, Any]] = {
    'vit_tiny': {'width': 192, 'depth': 12, 'heads': 3},
    'vit_small': {'width': 384, 'depth': 12, 'heads': 6},
    'vit_base': {'width': 768, 'depth': 12, 'heads': 12},
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(vit, **sizes) for name, sizes in SIZES.items()
}
