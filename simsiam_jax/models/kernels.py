"""Faster versions of the parts of a ResNet that XLA compiles badly for GPUs.

BN, shortcut and ReLU: the plain gradient writes the masked gradient and reads it again. The fused
gradient recomputes the mask from the convolution's output in each of two passes. Max-pool: the
plain gradient scatters; the fused gradient gathers by an index of one byte. Stem: cuDNN has slow
kernels for three channels; blocks of 2x2 pixels have twelve. All agree with the plain versions,
which are the reference. On TPUs the plain versions are faster, because XLA makes BN's sums part of
the convolutions.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KERNELS = ('auto', 'plain', 'fused')


def are_fused(kernels: str) -> bool:
    """Returns whether this choice of KERNELS uses the fused versions; 'auto' does on GPUs."""
    return kernels == 'fused' or (kernels == 'auto' and jax.default_backend() == 'gpu')


class NormReLU(nn.BatchNorm):
    """relu(BN(y) + shortcut) with the variables of nn.BatchNorm.

    Attributes:
      relu: Whether to apply the ReLU.
      fused: Whether training reads memory in two passes forward and two backward.
    """

    relu: bool = True
    fused: bool = False

    @nn.compact
    def __call__(  # type: ignore[override]
        self, y: Float[Array, 'B H W C'], shortcut: Float[Array, 'B H W C'] | None = None
    ) -> Float[Array, 'B H W C']:
        if self.use_running_average or not self.fused:
            x = super().__call__(y)
            x = x if shortcut is None else x + shortcut
            return nn.relu(x) if self.relu else x
        channels = y.shape[-1:]
        ra_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels)
        ra_var = self.variable('batch_stats', 'var', jnp.ones, channels)
        scale = self.param('scale', self.scale_init, channels)
        bias = self.param('bias', self.bias_init, channels)
        axis_name = None if self.is_initializing() else self.axis_name
        mean, var = _statistics(jax.lax.stop_gradient(y), axis_name)
        if not self.is_initializing():
            ra_mean.value = self.momentum * ra_mean.value + (1 - self.momentum) * mean
            ra_var.value = self.momentum * ra_var.value + (1 - self.momentum) * var
        rstd = jax.lax.rsqrt(var + self.epsilon)
        return _normalize((axis_name, self.relu), y, shortcut, scale, bias, mean, rstd)


def _statistics(y: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Returns mean and variance by channel over all devices, in float32, with one read of y."""
    x = y.astype(jnp.float32)
    sums = _sums(x, jnp.square(x))
    mean, square = _over_devices(sums, axis_name) / _count(y, axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def _sums(a: Array, b: Array) -> Array:
    """Returns sums by channel [2, C]; sums by image first, so that one small kernel ends both."""
    return jnp.stack([a.sum((1, 2)), b.sum((1, 2))]).sum(1)


def _over_devices(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _count(y: Array, axis_name: str | None) -> int:
    """Returns the number of values of a channel on all devices."""
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return y.size // y.shape[-1] * devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    static: tuple[str | None, bool],
    y: Array,
    shortcut: Array | None,
    scale: Array,
    bias: Array,
    mean: Array,
    rstd: Array,
) -> Array:
    """Returns the output in y's dtype; its gradient includes the one through `mean` and `rstd`."""
    _, relu = static
    x = _affine(y, scale, bias, mean, rstd)
    x = x.astype(y.dtype) if shortcut is None else x.astype(y.dtype) + shortcut
    return nn.relu(x) if relu else x


def _affine(y: Array, scale: Array, bias: Array, mean: Array, rstd: Array) -> Array:
    return (y - mean) * (rstd * scale) + bias


def _normalize_forward(static: Any, y: Array, shortcut: Array | None, *rest: Array) -> Any:
    out = _normalize(static, y, shortcut, *rest)
    if shortcut is None:
        return out, (y, None, *rest)
    # The next block reads the output anyway. The barrier keeps it; otherwise XLA would recompute it
    # from y and the shortcut.
    out = jax.lax.optimization_barrier(out)
    return out, (y, out, *rest)


def _normalize_backward(static: Any, residuals: Any, g: Array) -> Any:
    axis_name, relu = static
    y, out, scale, bias, mean, rstd = residuals

    def masked(y: Array, g: Array) -> Array:
        if not relu:
            return g
        positive = (_affine(y, scale, bias, mean, rstd) if out is None else out) > 0
        return jnp.where(positive, g, 0)

    d = masked(y, g)
    if out is not None:
        g = d  # the second pass reads the shortcut's gradient, which is written once
    d = d.astype(jnp.float32)
    own = _sums(d, d * (y - mean))
    total, count = _over_devices(own, axis_name), _count(y, axis_name)
    slope = rstd * scale
    offset = slope * total[0] / count
    projection = slope * jnp.square(rstd) * total[1] / count
    # Without the barrier XLA stores what both passes need, instead of computing it twice.
    y, g, offset, projection = jax.lax.optimization_barrier((y, g, offset, projection))
    d = (masked(y, g) if out is None else g).astype(jnp.float32)
    dy = slope * d - offset - projection * (y - mean)
    shortcut = None if out is None else g
    return dy.astype(y.dtype), shortcut, own[1] * rstd, own[0], None, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def max_pool(x: Float[Array, 'B H W C'], *, fused: bool = False) -> Float[Array, 'B H2 W2 C']:
    """Max-pools 3x3, stride 2, padding 1; the first of equal values, by rows, gets the gradient."""
    if fused:
        return _max_pool(x.shape[1:3], x)
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(size: tuple[int, int], x: Array) -> Array:
    return _max_pool_forward(size, x)[0]


def _max_pool_forward(size: tuple[int, int], x: Array) -> tuple[Array, Array]:
    """Returns the pooled image and the position, 0 to 8, of each maximum in its window."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(x, pad, constant_values=-jnp.inf)
    height, width = ((n + 1) // 2 for n in size)

    def pixels(position: int) -> Array:
        top, left = divmod(position, 3)
        return padded[:, top : top + 2 * height - 1 : 2, left : left + 2 * width - 1 : 2]

    best = pixels(0)
    index = jnp.zeros(best.shape, jnp.uint8)
    for position in range(1, 9):
        pixel = pixels(position)
        index = jnp.where(pixel > best, jnp.uint8(position), index)
        best = jnp.maximum(best, pixel)  # NaN stays NaN
    return best, index


def _max_pool_backward(size: tuple[int, int], index: Array, g: Array) -> tuple[Array]:
    dx = jnp.zeros((g.shape[0], *size, g.shape[3]), jnp.float32)
    # From the last position to the first, the plain gradient adds a pixel's windows by rows.
    for position in reversed(range(9)):
        part = jnp.where(index == position, g, 0).astype(jnp.float32)
        config = [(0, 0, 0)]
        for n, windows, offset in zip(size, g.shape[1:3], divmod(position, 3), strict=True):
            low = offset - 1
            config.append((low, n - low - (2 * windows - 1), 1))
        dx = dx + jax.lax.pad(part, jnp.float32(0), [*config, (0, 0, 0)])
    return (dx.astype(g.dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def space_to_depth_conv(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **kwargs: Any
) -> Float[Array, 'B H2 W2 D']:
    """Convolves 7x7 with stride 2 and padding 3, as a 4x4 convolution of blocks of 2x2 pixels.

    Args:
      x: Images [B, H, W, C].
      kernel: Weights [7, 7, C, D].
      strides: (2, 2); nn.Conv gives it.
      padding: 3 on all sides; nn.Conv gives it.
      **kwargs: Further arguments of jax.lax.conv_general_dilated.
    """
    channels = x.shape[-1]
    extra = -4 * channels % 8  # cuDNN has fast kernels for multiples of eight channels
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(4, 4, 4 * channels, -1)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, extra), (0, 0)))
    # Padding, slices and concatenation become part of the kernel that writes x.
    sides = [(4, 2 + n % 2) for n in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *sides, (0, 0)))
    parts = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    x = jnp.concatenate([*parts, jnp.zeros((*parts[0].shape[:3], extra), x.dtype)], -1)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'VALID', **kwargs)
