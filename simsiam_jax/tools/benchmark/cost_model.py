"""Operations and bytes of a training step by hand: from the shapes of the network's layers.

A step is counted as kernels, each of so many operations and bytes, in three ways of making them:

  separate: every BN, addition and ReLU is a kernel of its own
  fused: BN's statistics are one pass, normalization, shortcut and ReLU another; backward likewise
  ideal: statistics and sums in the convolution before, normalization in the convolution after
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simsiam_jax.models import resnet
from simsiam_jax.tools.benchmark.hardware import Device

FUSION_LEVELS = ('separate', 'fused', 'ideal')


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One pass over memory: operations, bytes."""

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the network and the elements that one image has in it.

    Attributes:
      kind: product (a convolution or fully connected layer), norm, block, or pool.
      inside: elements that come in; of a block, those of its shortcut.
      outside: elements that go out.
      macs: multiplications with addition.
      weights: elements of the kernel; of a norm, its channels.
      relu: a norm with a ReLU of its own after it, not one that a block adds its shortcut to.
      first: the images are its input, so that no gradient goes further.
    """

    kind: str
    inside: int
    outside: int
    macs: int = 0
    weights: int = 0
    relu: bool = False
    first: bool = False


def layers(network: nn.Module, size: int, channels: int) -> list[Layer]:
    """The layers that an image [size, size, channels] passes, in order.

    By shapes alone; the network takes (images, train).
    """
    found: dict[tuple[str, ...], Layer] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        module = context.module
        if context.method_name != '__call__' or not args:
            return result
        inside = args[0].size
        if isinstance(module, nn.Conv | nn.Dense):
            weights = module.variables['params']['kernel']
            macs = weights.size * result.size // weights.shape[-1]
            found[module.path] = Layer(
                'product', inside, result.size, macs, weights.size, first=not found
            )
        elif isinstance(module, nn.BatchNorm):
            ends = 'bn3' if isinstance(module.parent, resnet.Bottleneck) else 'bn2'
            block = isinstance(module.parent, resnet.Bottleneck | resnet.BasicBlock)
            relu = not (block and module.name in (ends, 'downsample_bn'))
            found[module.path] = Layer(
                'norm', inside, result.size, weights=result.shape[-1], relu=relu
            )
            parent = module.parent
            if isinstance(parent, resnet.ResNet) and parent.stem == 'imagenet':
                found[*parent.path, 'pool'] = Layer('pool', result.size, result.size // 4)
        elif isinstance(module, resnet.Bottleneck | resnet.BasicBlock):
            found[module.path] = Layer('block', result.size, result.size)
        return result

    def run(image: jax.Array) -> Any:
        variables = network.init(jax.random.key(0), image)
        with nn.intercept_methods(record):
            return network.apply(variables, image, train=False)

    jax.eval_shape(run, jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32))
    return list(found.values())


def kernels(
    layers: Sequence[Layer], images: int, way: str, width: int, *, backward: bool = True
) -> list[KernelCost]:
    """The kernels of a view of so many images.

    Args:
      way: one of WAYS.
      width: bytes of an element.
    """
    made = []
    for layer in layers:
        x, y = layer.inside * images * width, layer.outside * images * width
        ideal = way == 'ideal'
        if layer.kind == 'product':
            # Forward, the input's gradient, the weights' gradient.
            times = 1 + backward * (1 if layer.first else 2)
            made += [KernelCost(2 * layer.macs * images, x + y + layer.weights * width)] * times
            continue
        passes: list[int] = []
        if layer.kind == 'norm' and ideal:
            # The sums read y in the convolution that makes the gradient; dy is made from it and y
            # in the two that read it.
            passes = [y, 2 * y] if backward else []
        elif layer.kind == 'norm':
            # Statistics: y. Normalization: y to its result. Sums: the gradient and y. Gradient:
            # the same to dy.
            passes = [y, 2 * y] + [2 * y, 3 * y] * backward
            if way == 'separate' and layer.relu:
                passes += [2 * y] + [3 * y] * backward
        elif layer.kind == 'block':
            # The shortcut is read; the gradient that it brings is a second one to read and add.
            if way == 'separate':
                passes = [5 * y] + [6 * y] * backward
            else:
                passes = [3 * y if ideal else y] + [2 * y] * (backward and not ideal)
        else:
            passes = [x + y] + [2 * x + y] * backward
        made += [KernelCost(0, moved) for moved in passes]
    return made


def statistics_bytes(layers: Sequence[Layer], *, backward: bool = True) -> list[int]:
    """What the devices sum for a view's synchronized BN: two float32 a channel, each way."""
    sizes = [2 * 4 * layer.weights for layer in layers if layer.kind == 'norm']
    return sizes * (1 + backward)


def update_bytes(parameters: int) -> int:
    """SGD with momentum in float32: weights, momentum and gradient read, two written."""
    return 5 * 4 * parameters


def seconds(kernels: Sequence[KernelCost], device: Device) -> float:
    """The least time: each kernel takes as long as its arithmetic or its bytes."""
    return sum(max(k.flops / device.flops, k.bytes / device.bandwidth) for k in kernels)
