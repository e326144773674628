"""Names and layouts of the weights in PyTorch's files: NumPy both ways, no PyTorch.

Arrays are named as torchvision names them. A convolution's kernel [H, W, in, out] is a weight
[out, in, H, W] there, a fully connected layer's [in, out] one [out, in]. A backbone's values
are never changed: running variances stay what they are, although PyTorch's is n/(n-1) times
Flax's over the same n values. The counters num_batches_tracked, which nothing reads, are written
as 0.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from simsiam_jax import errors
from simsiam_jax.models import resnet

Arrays = dict[str, np.ndarray]
Variables = Mapping[str, Any]

COUNTER = 'num_batches_tracked'
LEAVES = {
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
    if (
        conv1.ndim != 4
        or conv1.shape[-1] not in stems
        or sorted(blocks) != [*range(1, len(blocks) + 1)]
    ):
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


def backbone_from_torch(backbone: Arrays, origin: str) -> Variables:
    """{'params', 'batch_stats'} of resnet.make(**identify(...)), the values unchanged.

    Raises:
      UserError: keys are missing, left over or of another shape, by their names.
    """
    model, channels = identify(backbone, origin)
    wanted = _flat(resnet.abstract_variables(resnet.make(**model), channels))
    names = {path: _name(path) for path in wanted}
    missing = set(names.values()) - set(backbone)
    extra = {name for name in set(backbone) - set(names.values()) if not name.endswith(COUNTER)}
    flat = {path: from_layout(backbone[name]) for path, name in names.items() if name in backbone}
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
    return rename({_name(path): array for path, array in _flat(variables).items()})


def rename(named: Mapping[str, Any]) -> Arrays:
    """Flax's arrays, already under PyTorch's names, in its layouts and with its counters."""
    arrays = {}
    for name, array in named.items():
        arrays[name] = to_layout(np.asarray(array, np.float32))
        if name.endswith('running_var'):
            arrays[name.replace('running_var', COUNTER)] = np.zeros((), np.int64)
    return arrays


def _flat(variables: Variables) -> dict[tuple[str, ...], Any]:
    """By path, the collection first."""
    return traverse_util.flatten_dict(
        {key: variables[key] for key in ('params', 'batch_stats') if key in variables}
    )


def _name(path: tuple[str, ...]) -> str:
    module = re.sub(r'^layer(\d+)_(\d+)\.', r'layer\1.\2.', '.'.join(path[1:-1]))
    module = module.replace('downsample_conv', 'downsample.0')
    return f'{module.replace("downsample_bn", "downsample.1")}.{LEAVES[path[-1]]}'


def from_layout(array: np.ndarray) -> np.ndarray:
    """PyTorch's weight as Flax's kernel; other arrays as they are."""
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def to_layout(array: np.ndarray) -> np.ndarray:
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def to_detectron2(backbone: Arrays) -> Arrays:
    """The same arrays under the names of Detectron2's ResNets: stem, res2 to res5."""
    renamed = {}
    for name, array in backbone.items():
        if name.endswith(COUNTER):  # its frozen BN counts nothing
            continue
        name = re.sub(r'^layer(\d+)', lambda match: f'res{int(match[1]) + 1}', name)
        name = re.sub(r'\bbn(\d+)\b', r'conv\1.norm', name)
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        renamed[name if name.startswith('res') else f'stem.{name}'] = array
    return renamed
