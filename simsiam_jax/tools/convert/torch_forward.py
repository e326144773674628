"""Runs the networks in PyTorch, straight from arrays, to compare with JAX."""

from types import ModuleType
from typing import Any

import numpy as np

from simsiam_jax.models import pytorch


def outputs(
    torch: ModuleType, parts: dict[str, pytorch.Arrays], images: np.ndarray, heads: int = 0
) -> dict[str, np.ndarray]:
    """Returns feature, and z and p if there are heads, in float32; BN uses running statistics.

    Args:
      torch: The PyTorch module.
      parts: Arrays under PyTorch's names (models/pytorch.py).
      images: Normalized images [B, H, W, C].
      heads: Number of attention heads of a ViT.
    """
    tensors = {
        name: {key: torch.tensor(np.asarray(x)) for key, x in arrays.items()}
        for name, arrays in parts.items()
    }
    with torch.inference_mode():
        x, w = torch.tensor(images.transpose(0, 3, 1, 2)), tensors['backbone']
        if 'cls_token' in w:
            x = _vit(torch, w, x, heads)
        elif 'stem.0.weight' in w:
            x = _convnext(torch, w, x)
        else:
            x = _backbone(torch, w, x)
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


def _norm(torch: ModuleType, w: dict[str, Any], name: str, x: Any) -> Any:
    weight, bias = w[f'{name}.weight'], w[f'{name}.bias']
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def _linear(torch: ModuleType, w: dict[str, Any], name: str, x: Any) -> Any:
    return torch.nn.functional.linear(x, w[f'{name}.weight'].flatten(1), w[f'{name}.bias'])


def _mlp(torch: ModuleType, w: dict[str, Any], name: str, x: Any) -> Any:
    x = torch.nn.functional.gelu(_linear(torch, w, f'{name}.fc1', x))
    return _linear(torch, w, f'{name}.fc2', x)


def _patches(torch: ModuleType, w: dict[str, Any], name: str, x: Any) -> Any:
    weight = w[f'{name}.weight']
    return torch.nn.functional.conv2d(x, weight, w[f'{name}.bias'], stride=weight.shape[-1])


def _vit(torch: ModuleType, w: dict[str, Any], x: Any, heads: int) -> Any:
    x = _patches(torch, w, 'patch_embed.proj', x).flatten(2).transpose(1, 2)
    x = torch.cat([w['cls_token'].expand(len(x), -1, -1), x], 1) + w['pos_embed']
    block = 0
    while f'blocks.{block}.norm1.weight' in w:
        name = f'blocks.{block}'
        qkv = _linear(torch, w, f'{name}.attn.qkv', _norm(torch, w, f'{name}.norm1', x))
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + _linear(torch, w, f'{name}.attn.proj', y.transpose(1, 2).flatten(2))
        x = x + _mlp(torch, w, f'{name}.mlp', _norm(torch, w, f'{name}.norm2', x))
        block += 1
    if 'fc_norm.weight' in w:
        return _norm(torch, w, 'fc_norm', x[:, 1:].mean(1))
    return _norm(torch, w, 'norm', x[:, 0])


def _convnext(torch: ModuleType, w: dict[str, Any], x: Any) -> Any:
    def norm(name: str, x: Any) -> Any:
        return _norm(torch, w, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    x = norm('stem.1', _patches(torch, w, 'stem.0', x))
    stage = 0
    while f'stages.{stage}.blocks.0.gamma' in w:
        if stage:
            x = norm(f'stages.{stage}.downsample.0', x)
            x = _patches(torch, w, f'stages.{stage}.downsample.1', x)
        block = 0
        while f'stages.{stage}.blocks.{block}.gamma' in w:
            name = f'stages.{stage}.blocks.{block}'
            weight, bias = w[f'{name}.conv_dw.weight'], w[f'{name}.conv_dw.bias']
            y = torch.nn.functional.conv2d(x, weight, bias, padding=3, groups=len(weight))
            y = _norm(torch, w, f'{name}.norm', y.permute(0, 2, 3, 1))
            y = _mlp(torch, w, f'{name}.mlp', y) * w[f'{name}.gamma']
            x = x + y.permute(0, 3, 1, 2)
            block += 1
        stage += 1
    return _norm(torch, w, 'head.norm', x.mean((2, 3)))


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
