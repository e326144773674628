"""Computes operations and bytes of a training step from the shapes of the network's layers.

A step is a list of kernels, each with its operations and bytes, at one of three levels of fusion:

- separate: Every BN, addition and ReLU is a kernel of its own.
- fused: BN's statistics are one pass; normalization, shortcut and ReLU are another; backward
  likewise.
- ideal: Statistics and sums are in the convolution before, normalization in the convolution after.
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
    """Operations and bytes of one pass over memory."""

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the network and its elements for one image.

    Attributes:
      kind: product (a convolution or fully connected layer) | norm | block | pool.
      inside: Elements of the input; for a block, elements of its shortcut.
      outside: Elements of the output.
      macs: Multiply-accumulate operations.
      weights: Elements of the kernel; for a norm, its channels.
      relu: Whether a norm has its own ReLU, without a shortcut added before it.
      first: Whether the images are its input, which needs no gradient.
    """

    kind: str
    inside: int
    outside: int
    macs: int = 0
    weights: int = 0
    relu: bool = False
    first: bool = False


def layers(network: nn.Module, size: int, channels: int) -> list[Layer]:
    """Returns the layers for an image [size, size, channels] in order, without computing anything.

    Args:
      network: Called with (images, train).
      size: Height and width of the image.
      channels: Channels of the image.
    """
    by_path: dict[tuple[str, ...], Layer] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        module = context.module
        if context.method_name != '__call__' or not args:
            return result
        inside = args[0].size
        if isinstance(module, nn.Conv | nn.Dense):
            weights = module.variables['params']['kernel']
            macs = weights.size * result.size // weights.shape[-1]
            by_path[module.path] = Layer(
                'product', inside, result.size, macs, weights.size, first=not by_path
            )
        elif isinstance(module, nn.BatchNorm):
            ends = 'bn3' if isinstance(module.parent, resnet.Bottleneck) else 'bn2'
            block = isinstance(module.parent, resnet.Bottleneck | resnet.BasicBlock)
            relu = not (block and module.name in (ends, 'downsample_bn'))
            by_path[module.path] = Layer(
                'norm', inside, result.size, weights=result.shape[-1], relu=relu
            )
            parent = module.parent
            if isinstance(parent, resnet.ResNet) and parent.stem == 'imagenet':
                by_path[*parent.path, 'pool'] = Layer('pool', result.size, result.size // 4)
        elif isinstance(module, resnet.Bottleneck | resnet.BasicBlock):
            by_path[module.path] = Layer('block', result.size, result.size)
        return result

    def run(image: jax.Array) -> Any:
        variables = network.init(jax.random.key(0), image)
        with nn.intercept_methods(record):
            return network.apply(variables, image, train=False)

    jax.eval_shape(run, jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32))
    return list(by_path.values())


def kernels(
    layers: Sequence[Layer], images: int, fusion: str, width: int, *, backward: bool = True
) -> list[KernelCost]:
    """Returns the kernels of a view through the network.

    Args:
      layers: Layers of the network.
      images: Number of images in the view.
      fusion: One of FUSION_LEVELS.
      width: Bytes of an element.
      backward: Whether the view has a backward pass.
    """
    costs = []
    for layer in layers:
        x, y = layer.inside * images * width, layer.outside * images * width
        ideal = fusion == 'ideal'
        if layer.kind == 'product':
            # Forward, the input's gradient, the weights' gradient.
            times = 1 + backward * (1 if layer.first else 2)
            costs += [KernelCost(2 * layer.macs * images, x + y + layer.weights * width)] * times
            continue
        passes: list[int] = []
        if layer.kind == 'norm' and ideal:
            # The convolution that writes the gradient reads y for the sums. The two that read the
            # gradient compute dy from it and y.
            passes = [y, 2 * y] if backward else []
        elif layer.kind == 'norm':
            # Statistics read y. Normalization reads y and writes the result. Sums read the gradient
            # and y. The gradient pass reads both and writes dy.
            passes = [y, 2 * y] + [2 * y, 3 * y] * backward
            if fusion == 'separate' and layer.relu:
                passes += [2 * y] + [3 * y] * backward
        elif layer.kind == 'block':
            # The shortcut is read. Its gradient is a second one, which is read and added.
            if fusion == 'separate':
                passes = [5 * y] + [6 * y] * backward
            else:
                passes = [3 * y if ideal else y] + [2 * y] * (backward and not ideal)
        else:
            passes = [x + y] + [2 * x + y] * backward
        costs += [KernelCost(0, moved) for moved in passes]
    return costs


def statistics_bytes(layers: Sequence[Layer], *, backward: bool = True) -> list[int]:
    """Returns the bytes of each all-reduce of a view's BN: two float32 per channel, each way."""
    sizes = [2 * 4 * layer.weights for layer in layers if layer.kind == 'norm']
    return sizes * (1 + backward)


def update_bytes(parameters: int) -> int:
    """Returns the bytes of SGD with momentum in float32: three arrays read, two written."""
    return 5 * 4 * parameters


def seconds(kernels: Sequence[KernelCost], device: Device) -> float:
    """Returns the minimum time, with each kernel limited by its arithmetic or its bytes."""
    return sum(max(k.flops / device.flops, k.bytes / device.bandwidth) for k in kernels)
