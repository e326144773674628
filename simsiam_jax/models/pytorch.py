"""Names and layouts of weights in PyTorch's files, both ways in NumPy, without PyTorch.

Arrays have torchvision's names. A convolution's kernel [H, W, in, out] becomes a weight
[out, in, H, W], a fully connected layer's kernel [in, out] a weight [out, in]. The values of a
backbone never change: running variances are kept, although PyTorch's are n/(n-1) times Flax's over
the same n values. The counters num_batches_tracked, which nothing reads, are written as 0.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Set
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


def describe(prefix: str, left_out: Iterable[str]) -> str:
    """Returns which network of a file was loaded, and what was left out; '' if it is all."""
    texts = [prefix.rstrip('.')] if prefix else []
    if left_out:
        texts.append(f'left out: {errors.first(left_out, 6)}')
    return '; '.join(texts)


def check_names(
    given: Set[str], expected: Set[str], misshaped: Set[str], message: str, known: Iterable[str]
) -> None:
    """Checks that a file has the arrays of a network.

    Args:
      given: Names in the file.
      expected: Names of the network.
      misshaped: Names of arrays of another shape.
      message: Message of the error, without the names.
      known: Networks that can be loaded.

    Raises:
      UserError: Arrays are missing, unexpected or of a different shape.
    """
    differences = {
        'missing': expected - given,
        'unexpected': given - expected,
        'different shape': misshaped,
    }
    found = [f'{kind}: {errors.first(names)}' for kind, names in differences.items() if names]
    if found:
        raise errors.UserError(f'{message}: {"; ".join(found)}. Use one of {", ".join(known)}')


def identify(backbone: Arrays, origin: str) -> tuple[dict[str, Any], int]:
    """Returns the arguments of resnet.make and the number of input channels.

    Args:
      backbone: Arrays under torchvision's names; only their names and shapes are used.
      origin: Name of the file, for messages.

    Raises:
      UserError: The network is none of this package's ResNets.
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
            f'unknown network in {origin}: conv1 has shape {list(conv1.shape)} and the layers are '
            f'{sorted(blocks)}; expected a conv1 of 7x7 or 3x3 and layer1 to layer4. Use one of '
            f'{", ".join(resnet.RESNETS)}'
        )
    stages = tuple(blocks[i] for i in sorted(blocks))
    block = resnet.Bottleneck if 'layer1.0.conv3.weight' in backbone else resnet.BasicBlock
    names = {architecture: name for name, architecture in resnet.RESNETS.items()}
    fallback = 'resnet50' if block is resnet.Bottleneck else 'resnet18'
    model = {
        'name': names.get((block, stages), fallback),
        'stem': stems[conv1.shape[-1]],
        'width_multiplier': conv1.shape[0] / 64,
        'stages': () if (block, stages) in names else stages,
    }
    return model, conv1.shape[1]


def backbone_from_torch(backbone: Arrays, origin: str) -> Variables:
    """Returns {'params', 'batch_stats'} of ``resnet.make(**identify(...))``, the values unchanged.

    Args:
      backbone: Arrays under torchvision's names.
      origin: Name of the file, for messages.

    Raises:
      UserError: Arrays are missing, unexpected or of a different shape.
    """
    model, channels = identify(backbone, origin)
    expected = _flat(resnet.abstract_variables(resnet.make(**model), channels))
    names = {path: _name(path) for path in expected}
    given = {name for name in backbone if not name.endswith(COUNTER)}
    flat = {path: from_layout(backbone[name]) for path, name in names.items() if name in backbone}
    misshaped = {names[path] for path, x in flat.items() if x.shape != expected[path].shape}
    message = f'{origin} does not match {model["name"]}'
    check_names(given, set(names.values()), misshaped, message, resnet.RESNETS)
    return traverse_util.unflatten_dict(flat)


def backbone_to_torch(variables: Variables) -> Arrays:
    """Returns the arrays of torchvision's resnetNN without its fc."""
    return rename({_name(path): array for path, array in _flat(variables).items()})


def rename(named: Mapping[str, Any]) -> Arrays:
    """Returns Flax's arrays under PyTorch's names in PyTorch's layouts, with its counters."""
    arrays = {}
    for name, array in named.items():
        arrays[name] = to_layout(np.asarray(array, np.float32))
        if name.endswith('running_var'):
            arrays[name.replace('running_var', COUNTER)] = np.zeros((), np.int64)
    return arrays


def _flat(variables: Variables) -> dict[tuple[str, ...], Any]:
    """Returns the arrays by path, which starts with the collection."""
    return traverse_util.flatten_dict(
        {key: variables[key] for key in ('params', 'batch_stats') if key in variables}
    )


def _name(path: tuple[str, ...]) -> str:
    module = re.sub(r'^layer(\d+)_(\d+)\.', r'layer\1.\2.', '.'.join(path[1:-1]))
    module = module.replace('downsample_conv', 'downsample.0')
    return f'{module.replace("downsample_bn", "downsample.1")}.{LEAVES[path[-1]]}'


def from_layout(array: np.ndarray) -> np.ndarray:
    """Returns PyTorch's weight as Flax's kernel, and other arrays unchanged."""
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def to_layout(array: np.ndarray) -> np.ndarray:
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(order)) if order else array


def to_detectron2(backbone: Arrays) -> Arrays:
    """Returns the arrays under the names of Detectron2's ResNets: stem, res2 to res5."""
    renamed = {}
    for name, array in backbone.items():
        if name.endswith(COUNTER):  # its frozen BN has no counter
            continue
        name = re.sub(r'^layer(\d+)', lambda match: f'res{int(match[1]) + 1}', name)
        name = re.sub(r'\bbn(\d+)\b', r'conv\1.norm', name)
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        renamed[name if name.startswith('res') else f'stem.{name}'] = array
    return renamed
