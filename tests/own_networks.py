"""Networks as users write them, for test_backbones.py: some meet the contract, some do not."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Tiny(nn.Module):
    """A convolution with BN and dropout."""

    width: int = 8
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), strides=2)(images)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.relu(x).mean((1, 2))


class WithoutBN(nn.Module):
    """Patches whose projection stays as it was drawn, and a fully connected layer."""

    width: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (2, 2), strides=2, name='frozen_patches')(images)
        return nn.Dense(self.width)(nn.relu(x)).mean((1, 2))


class NNXNet(nnx.Module):
    """A convolution with BN as an NNX module."""

    def __init__(self, width: int, channels: int, axis_name: str | None, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, axis_name=axis_name, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = self.bn(self.conv(images), use_running_average=not train)
        return jax.nn.relu(x).mean((1, 2))


def tiny(width: int = 8, axis_name: str | None = None) -> nn.Module:
    return Tiny(width, axis_name)


def unsynchronized(width: int = 8) -> nn.Module:
    return Tiny(width)


def without_bn(width: int = 8) -> nn.Module:
    return WithoutBN(width)


def bridged(width: int = 8, axis_name: str | None = None) -> nn.Module:
    return nnx.bridge.to_linen(NNXNet, width, 1, axis_name)


class Maps(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return nn.Conv(4, (3, 3))(images)


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Conv(4, (3, 3))(images).mean((1, 2))


class OtherVariables(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        count = self.variable('counts', 'calls', lambda: jnp.zeros(()))
        return images.mean((1, 2)) + count.value


class Fails(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return images.reshape(3, 5)


def maps() -> nn.Module:
    return Maps()


def without_train() -> nn.Module:
    return WithoutTrain()


def other_variables() -> nn.Module:
    return OtherVariables()


def fails() -> nn.Module:
    return Fails()


def not_linen() -> Any:
    return NNXNet
