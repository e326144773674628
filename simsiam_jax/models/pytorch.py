"""Names and layouts of the weights in PyTorch's files: NumPy both ways, no PyTorch.

Arrays are named as torchvision names them. A convolution's kernel [H, W, in, out] is a weight
[out, in, H, W] there, a fully connected layer's [in, out] one [out, in]. Values are never
changed: running variances stay what they are, although PyTorch's is n/(n-1) times Flax's over
the same n values. The counters num_batches_tracked, which nothing reads, are written as 0.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from simsiam_jax import errors
from simsiam_jax.models import heads, resnet

Arrays = dict[str, np.ndarray]
Variables = Mapping[str, Any]

_COUNTER = 'num_batches_tracked'
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}

# Where files keep the backbone: prefix -> (the predictor's prefix, prefixes of what is not
# needed). SimSiam's official code has encoder, MoCo's encoder_q; `module` is DataParallel's.
_LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    '': ('', ()),
    'module.': ('', ()),
    'encoder.': ('predictor.', ()),
    'module.encoder.': ('module.predictor.', ()),
    'encoder_q.': ('', ('encoder_k.', 'queue')),
    'module.encoder_q.': ('', ('module.encoder_k.', 'module.queue')),
}


def first(names: Iterable[str], count: int = 3) -> str:
    """The first few names and how many more there are."""
    names = sorted(names)
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + rest


def split(arrays: Arrays, origin: str) -> dict[str, Arrays]:
    """backbone, and of SimSiam's own files projector and predictor: each with names of its own.

    A classifier and other methods' heads are left out.

    Raises:
      UserError: no backbone is found, or arrays are left over.
    """
    prefixes = [p for p in _LAYOUTS if f'{p}conv1.weight' in arrays]
    if not prefixes:
        raise errors.UserError(
            f'{origin} holds no ResNet: conv1.weight was expected, alone or after '
            f'{", ".join(p for p in _LAYOUTS if p)}; there is {first(arrays) or "nothing"}'
        )
    prefix = prefixes[0]
    predictor, unneeded = _LAYOUTS[prefix]
    parts: dict[str, Arrays] = {'backbone': {}, 'projector': {}, 'predictor': {}}
    left_over = []
    for name, array in arrays.items():
        if predictor and name.startswith(predictor):
            parts['predictor'][name.removeprefix(predictor)] = array
        elif name.startswith(f'{prefix}fc.'):
            parts['projector'][name.removeprefix(f'{prefix}fc.')] = array
        elif name.startswith(prefix):
            parts['backbone'][name.removeprefix(prefix)] = array
        elif not name.startswith(unneeded):
            left_over.append(name)
    if left_over:
        raise errors.UserError(
            f'{origin}: {first(left_over)} left over beside the ResNet under '
            f'{prefix or "plain"} names; remove what does not belong to it'
        )
    return parts if parts['predictor'] else {'backbone': parts['backbone']}


def identify(backbone: Arrays, origin: str) -> tuple[dict[str, Any], int]:
    """The arguments of resnet.make and the number of input channels, from names and shapes.

    Raises:
      UserError: it is not one of this package's ResNets.
    """
    conv1 = backbone['conv1.weight']
    blocks: collections.Counter[int] = collections.Counter()
    for name in backbone:
        if match := re.match(r'layer(\d+)\.(\d+)\.', name):
            blocks[int(match[1])] = max(blocks[int(match[1])], int(match[2]) + 1)
    stems = {7: 'imagenet', 3: 'cifar'}
    if conv1.ndim != 4 or conv1.shape[-1] not in stems or sorted(blocks) != _up_to(len(blocks)):
        raise errors.UserError(
            f'{origin} is another network: a conv1 of 7x7 or 3x3 and layer1 to layer4 were '
            f'expected, conv1 has shape {list(conv1.shape)} and there are layers {sorted(blocks)}'
        )
    stages = tuple(blocks[i] for i in sorted(blocks))
    block = resnet.Bottleneck if 'layer1.0.conv3.weight' in backbone else resnet.BasicBlock
    names = {kind: name for name, kind in resnet.RESNETS.items()}
    fallback = 'resnet50' if block is resnet.Bottleneck else 'resnet18'
    named = (block, stages) in names
    model = {
        'name': names.get((block, stages), fallback),
        'stem': stems[conv1.shape[-1]],
        'width_multiplier': conv1.shape[0] / 64,
        'stages': () if named else stages,
    }
    return model, conv1.shape[1]


def _up_to(n: int) -> list[int]:
    return list(range(1, n + 1))


def backbone_from_torch(backbone: Arrays, origin: str) -> Variables:
    """{'params', 'batch_stats'} of resnet.make(**identify(...)), the values unchanged.

    Raises:
      UserError: keys are missing, left over or of another shape, by their names.
    """
    model, channels = identify(backbone, origin)
    wanted = _flat(resnet.abstract_variables(resnet.make(**model), channels))
    names = {path: _name(path) for path in wanted}
    missing = set(names.values()) - set(backbone)
    extra = {name for name in set(backbone) - set(names.values()) if not name.endswith(_COUNTER)}
    flat = {path: _from_layout(backbone[name]) for path, name in names.items() if name in backbone}
    unfit = {names[path] for path, array in flat.items() if array.shape != wanted[path].shape}
    if missing or extra or unfit:
        found = {'missing': missing, 'left over': extra, 'of another shape': unfit}
        raise errors.UserError(
            f'{origin} is no {model["name"]}: '
            + '; '.join(f'{first(keys)} {what}' for what, keys in found.items() if keys)
            + f'; this package has {", ".join(resnet.RESNETS)} alone'
        )
    return traverse_util.unflatten_dict(flat)


def backbone_to_torch(variables: Variables) -> Arrays:
    """The arrays of torchvision's resnetNN without its fc."""
    return _to_torch({_name(path): array for path, array in _flat(variables).items()})


def _to_torch(named: Mapping[str, Any]) -> Arrays:
    arrays = {}
    for name, array in named.items():
        arrays[name] = _to_layout(np.asarray(array, np.float32))
        if name.endswith('running_var'):
            arrays[name.replace('running_var', _COUNTER)] = np.zeros((), np.int64)
    return arrays


def _flat(variables: Variables) -> dict[tuple[str, ...], Any]:
    """By path, the collection first."""
    return traverse_util.flatten_dict(
        {key: variables[key] for key in ('params', 'batch_stats') if key in variables}
    )


def _name(path: tuple[str, ...]) -> str:
    module = re.sub(r'^layer(\d+)_(\d+)\.', r'layer\1.\2.', '.'.join(path[1:-1]))
    module = module.replace('downsample_conv', 'downsample.0')
    return f'{module.replace("downsample_bn", "downsample.1")}.{_LEAVES[path[-1]]}'


def _from_layout(array: np.ndarray) -> np.ndarray:
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def _to_layout(array: np.ndarray) -> np.ndarray:
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def head_to_torch(variables: Variables, output_bias: bool = False) -> Arrays:
    """The arrays of nn.Sequential(Linear, BatchNorm1d, ReLU, Linear, ...) for a heads.MLP.

    Args:
      output_bias: zeros for the last layer's bias where there is none: the official projector
        ends with the ResNet's own fc, whose bias the BN after it cancels.
    """
    params, stats = variables['params'], variables.get('batch_stats', {})
    named: dict[str, Any] = {}
    depth, index = sum(key.startswith('fc') for key in params), 0
    for i in _up_to(depth):
        named |= {f'{index}.{_LEAVES[leaf]}': x for leaf, x in params[f'fc{i}'].items()}
        if output_bias and i == depth:
            width = params[f'fc{i}']['kernel'].shape[1]
            named.setdefault(f'{index}.bias', np.zeros(width, np.float32))
        index += 1
        if f'bn{i}' in stats:
            bn = {**params.get(f'bn{i}', {}), **stats[f'bn{i}']}
            named |= {f'{index}.{_LEAVES[leaf]}': x for leaf, x in bn.items()}
            index += 1
        index += 1  # the ReLU
    return _to_torch(named)


def head_from_torch(head: Arrays, origin: str) -> Variables:
    """The {'params', 'batch_stats'} of a heads.MLP.

    A bias before a BN, whose effect the BN takes away, becomes part of its running mean.

    Raises:
      UserError: the layers are not fully connected ones with a BN after some.
    """
    layers: dict[int, Arrays] = collections.defaultdict(dict)
    for name, array in head.items():
        number, _, leaf = name.partition('.')
        if not number.isdigit():
            raise errors.UserError(f'{origin}: a head of numbered layers was expected, not {name}')
        if leaf != _COUNTER:
            layers[int(number)][leaf] = array
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    depth = 0
    for index in sorted(layers):
        layer = layers[index]
        if 'running_var' not in layer:
            depth += 1
            params[f'fc{depth}'] = {'kernel': _from_layout(layer['weight'])}
            if 'bias' in layer:
                params[f'fc{depth}']['bias'] = layer['bias']
            continue
        mean, bias = layer['running_mean'], params[f'fc{depth}'].pop('bias', None)
        stats[f'bn{depth}'] = {
            'mean': mean if bias is None else mean - bias,
            'var': layer['running_var'],
        }
        if 'weight' in layer:
            params[f'bn{depth}'] = {'scale': layer['weight'], 'bias': layer['bias']}
    return {'params': params, 'batch_stats': stats}


def mlp_of(head: Variables) -> heads.MLP:
    """The module that has such variables."""
    params, stats = head['params'], head.get('batch_stats', {})
    depth = sum(key.startswith('fc') for key in params)
    return heads.MLP(
        tuple(params[f'fc{i}']['kernel'].shape[1] for i in _up_to(depth)),
        hidden_bn=depth == 1 or 'bn1' in stats,
        output_bn=f'bn{depth}' in stats,
        output_affine=f'bn{depth}' in params,
    )


def simsiam_arguments(projector: heads.MLP, predictor: heads.MLP) -> dict[str, Any]:
    """The arguments of methods.simsiam.make that give such heads."""
    return {
        'dim': projector.widths[-1],
        'projector_layers': len(projector.widths),
        'projector_hidden_bn': projector.hidden_bn,
        'projector_output_bn': projector.output_bn,
        'projector_output_affine': projector.output_affine,
        'predictor_width': predictor.widths[0],
        'predictor_hidden_bn': predictor.hidden_bn,
        'predictor_output_bn': predictor.output_bn,
    }


def to_detectron2(backbone: Arrays) -> Arrays:
    """The same arrays under the names of Detectron2's ResNets: stem, res2 to res5."""
    renamed = {}
    for name, array in backbone.items():
        if name.endswith(_COUNTER):  # its frozen BN counts nothing
            continue
        name = re.sub(r'^layer(\d+)', lambda match: f'res{int(match[1]) + 1}', name)
        name = re.sub(r'\bbn(\d+)\b', r'conv\1.norm', name)
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        renamed[name if name.startswith('res') else f'stem.{name}'] = array
    return renamed
