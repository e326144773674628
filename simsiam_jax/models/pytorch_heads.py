"""Projectors and predictors under the names of SimSiam's official code; see models/pytorch.py."""

import collections
from typing import Any

import numpy as np

from simsiam_jax import errors
from simsiam_jax.models import heads, pytorch


def to_torch(variables: pytorch.Variables, output_bias: bool = False) -> pytorch.Arrays:
    """Returns the arrays of nn.Sequential(Linear, BatchNorm1d, ReLU, Linear, ...) for a heads.MLP.

    Args:
      variables: {'params', 'batch_stats'} of the MLP.
      output_bias: Whether to add zeros for a missing bias of the last layer. The official projector
        ends with the ResNet's own fc, whose bias the BN after it cancels.
    """
    params, stats = variables['params'], variables.get('batch_stats', {})
    named: dict[str, Any] = {}
    depth, index = sum(key.startswith('fc') for key in params), 0
    for i in range(1, depth + 1):
        named |= {f'{index}.{pytorch.LEAVES[leaf]}': x for leaf, x in params[f'fc{i}'].items()}
        if output_bias and i == depth:
            width = params[f'fc{i}']['kernel'].shape[1]
            named.setdefault(f'{index}.bias', np.zeros(width, np.float32))
        index += 1
        if f'bn{i}' in stats:
            bn = {**params.get(f'bn{i}', {}), **stats[f'bn{i}']}
            named |= {f'{index}.{pytorch.LEAVES[leaf]}': x for leaf, x in bn.items()}
            index += 1
        index += 1  # the ReLU
    return pytorch.rename(named)


def from_torch(head: pytorch.Arrays, origin: str) -> pytorch.Variables:
    """Returns the {'params', 'batch_stats'} of a heads.MLP.

    A bias before a BN, which the BN cancels, becomes part of its running mean.

    Args:
      head: Arrays under PyTorch's names.
      origin: Name of the file, for messages.

    Raises:
      UserError: A layer is neither fully connected nor a BN.
    """
    layers: dict[str, pytorch.Arrays] = collections.defaultdict(dict)
    for name, array in head.items():
        number, _, leaf = name.partition('.')
        if leaf != pytorch.COUNTER:
            layers[number][leaf] = array
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    depth = 0
    for number in sorted(layers, key=lambda text: (len(text), text)):
        layer = layers[number]
        if number.isdigit() and getattr(layer.get('weight'), 'ndim', 0) == 2:
            depth += 1
            params[f'fc{depth}'] = {'kernel': pytorch.from_layout(layer['weight'])}
            if 'bias' in layer:
                params[f'fc{depth}']['bias'] = layer['bias']
        elif depth and {'running_mean', 'running_var'} <= set(layer):
            mean, bias = layer['running_mean'], params[f'fc{depth}'].pop('bias', None)
            mean = mean if bias is None else mean - bias
            stats[f'bn{depth}'] = {'mean': mean, 'var': layer['running_var']}
            if 'weight' in layer:
                params[f'bn{depth}'] = {'scale': layer['weight'], 'bias': layer['bias']}
        else:
            raise errors.UserError(
                f'unknown layer in a head of {origin}: {number}.{next(iter(layer))}; expected '
                'fully connected layers and BN. Use a head of such layers'
            )
    return {'params': params, 'batch_stats': stats}


def mlp_of(head: pytorch.Variables) -> heads.MLP:
    """Returns the module for these variables."""
    params, stats = head['params'], head.get('batch_stats', {})
    depth = sum(key.startswith('fc') for key in params)
    return heads.MLP(
        tuple(params[f'fc{i}']['kernel'].shape[1] for i in range(1, depth + 1)),
        hidden_bn=depth == 1 or 'bn1' in stats,
        output_bn=f'bn{depth}' in stats,
        output_affine=f'bn{depth}' in params,
    )


def simsiam_arguments(projector: heads.MLP, predictor: heads.MLP) -> dict[str, Any]:
    """Returns the arguments of methods.simsiam.make for these heads."""
    return {
        'dim': projector.widths[-1],
        'projector_layers': len(projector.widths),
        'projector_hidden_dim': projector.widths[0],
        'projector_hidden_bn': projector.hidden_bn,
        'projector_output_bn': projector.output_bn,
        'projector_output_affine': projector.output_affine,
        'predictor_hidden_dim': predictor.widths[0],
        'predictor_hidden_bn': predictor.hidden_bn,
        'predictor_output_bn': predictor.output_bn,
    }
