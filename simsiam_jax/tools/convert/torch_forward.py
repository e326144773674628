"""Runs the networks in PyTorch, straight from arrays, to compare with JAX."""

from types import ModuleType
from typing import Any

import numpy as np

from simsiam_jax.models import pytorch


def outputs(
    torch: ModuleType, parts: dict[str, pytorch.Arrays], images: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns feature, and z and p if there are heads, in float32; BN uses running statistics.

    Args:
      torch: The PyTorch module.
      parts: Arrays under PyTorch's names (models/pytorch.py).
      images: Normalized images [B, H, W, C].
    """
    tensors = {
        name: {key: torch.tensor(np.asarray(x)) for key, x in arrays.items()}
        for name, arrays in parts.items()
    }
    with torch.inference_mode():
        x = _backbone(torch, tensors['backbone'], torch.tensor(images.transpose(0, 3, 1, 2)))
        by_name = {'feature': x}
        for name, head in (('z', 'projector'), ('p', 'predictor')):
            if head in tensors:
                by_name[name] = x = _head(torch, tensors[head], x)
    return {name: value.numpy() for name, value in by_name.items()}


def _bn(torch: ModuleType, w: dict[str, Any], name: str, x: Any) -> Any:
    mean, var = w[f'{name}.running_mean'], w[f'{name}.running_var']
    scale, bias = w.get(f'{name}.weight'), w.get(f'{name}.bias')
    return torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=1e-5)


def _conv(torch: ModuleType, w: dict[str, Any], name: str, x: Any, stride: int) -> Any:
    weight = w[f'{name}.weight']
    padding = weight.shape[-1] // 2
    return torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)


def _backbone(torch: ModuleType, w: dict[str, Any], x: Any) -> Any:
    imagenet = w['conv1.weight'].shape[-1] == 7
    x = torch.relu(_bn(torch, w, 'bn1', _conv(torch, w, 'conv1', x, 2 if imagenet else 1)))
    if imagenet:
        x = torch.nn.functional.max_pool2d(x, 3, 2, padding=1)
    stage = 1
    while f'layer{stage}.0.conv1.weight' in w:
        block = 0
        while f'layer{stage}.{block}.conv1.weight' in w:
            stride = 2 if stage > 1 and block == 0 else 1
            x = _block(torch, w, f'layer{stage}.{block}', x, stride)
            block += 1
        stage += 1
    return x.mean((2, 3))


def _block(torch: ModuleType, w: dict[str, Any], name: str, x: Any, stride: int) -> Any:
    depth = 3 if f'{name}.conv3.weight' in w else 2
    strided = depth - 1  # the first 3x3 convolution
    y = x
    for i in range(1, depth + 1):
        y = _conv(torch, w, f'{name}.conv{i}', y, stride if i == strided else 1)
        y = _bn(torch, w, f'{name}.bn{i}', y)
        if i < depth:
            y = torch.relu(y)
    if f'{name}.downsample.0.weight' in w:
        x = _conv(torch, w, f'{name}.downsample.0', x, stride)
        x = _bn(torch, w, f'{name}.downsample.1', x)
    return torch.relu(x + y)


def _head(torch: ModuleType, w: dict[str, Any], x: Any) -> Any:
    indices = sorted({int(key.partition('.')[0]) for key in w})
    previous = 0
    for i in indices:
        if i > previous + 1:  # the index skips ReLUs, which have no weights
            x = torch.relu(x)
        if f'{i}.running_var' in w:
            x = _bn(torch, w, str(i), x)
        else:
            x = torch.nn.functional.linear(x, w[f'{i}.weight'], w.get(f'{i}.bias'))
        previous = i
    return x
