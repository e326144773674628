"""Projectors and predictors as SimSiam's official code names them; see models/pytorch.py."""

import collections
from typing import Any

import numpy as np

from simsiam_jax import errors
from simsiam_jax.models import heads, pytorch


def to_torch(variables: pytorch.Variables, output_bias: bool = False) -> pytorch.Arrays:
    """The arrays of nn.Sequential(Linear, BatchNorm1d, ReLU, Linear, ...) for a heads.MLP.

    Args:
      output_bias: zeros for the last layer's bias where there is none: the official projector
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
    """The {'params', 'batch_stats'} of a heads.MLP.

    A bias before a BN, whose effect the BN takes away, becomes part of its running mean.

    Raises:
      UserError: the layers are not fully connected ones with a BN after some.
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
                f'{origin}: fully connected layers and BN were expected in a head, not '
                f'{number}.{next(iter(layer))}'
            )
    return {'params': params, 'batch_stats': stats}


def mlp_of(head: pytorch.Variables) -> heads.MLP:
    """The module that has such variables."""
    params, stats = head['params'], head.get('batch_stats', {})
    depth = sum(key.startswith('fc') for key in params)
    return heads.MLP(
        tuple(params[f'fc{i}']['kernel'].shape[1] for i in range(1, depth + 1)),
        hidden_bn=depth == 1 or 'bn1' in stats,
        output_bn=f'bn{depth}' in stats,
        output_affine=f'bn{depth}' in params,
    )


def simsiam_arguments(projector: heads.MLP, predictor: heads.MLP) -> dict[str, Any]:
    """The arguments of methods.simsiam.make that give such heads."""
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
