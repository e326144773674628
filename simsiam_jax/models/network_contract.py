"""Checks that a network of a user is one that the methods can train."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from simsiam_jax import errors


def not_linen(what: str, network: Any) -> str:
    """Returns the message that `what` is not a Linen module."""
    given = type(network).__name__
    if isinstance(network, type):
        given = f'the class {network.__name__}'
    return (
        f'{what} is {given}; expected a Flax Linen module. Wrap an NNX class by '
        'flax.nnx.bridge.to_linen(CLASS, ...)'
    )


def check(name: str, network: nn.Module, size: int, channels: int) -> int:
    """Returns the width of the features; computes nothing.

    Raises:
      UserError: The network does not meet the contract.
    """
    parameters = inspect.signature(network.__call__).parameters
    flexible = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    if 'train' not in parameters and not flexible:
        raise errors.UserError(
            f'model.name is {name!r}, whose __call__ takes {", ".join(parameters)}; expected '
            '__call__(images, train). Add the argument train'
        )
    key = jax.random.key(0)

    def run(images: Array) -> Any:
        variables = network.init({'params': key, 'dropout': key}, images, train=False)
        out, _ = network.apply(
            variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': key}
        )
        return out, variables

    shape = (2, size, size, channels)
    try:
        out, variables = jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
    except errors.UserError:
        raise
    except Exception as error:  # any type: the network is a program of the user
        raise errors.UserError(
            f'model.name is {name!r}, whose call with images {list(shape)} and train=True failed: '
            f'{type(error).__name__}: {errors.reason(error)}'
        ) from error
    given = list(out.shape) if hasattr(out, 'shape') else type(out).__name__
    if getattr(out, 'ndim', 0) != 2 or out.shape[0] != 2:
        raise errors.UserError(
            f'model.name is {name!r}, which returns {given} for images {list(shape)}; expected '
            'features [B, D]. Pool maps, such as by x.mean((1, 2))'
        )
    if others := sorted(set(variables) - {'params', 'batch_stats'}):
        raise errors.UserError(
            f'model.name is {name!r}, which has variables {", ".join(others)}; expected params and '
            'batch_stats only'
        )
    paths = jax.tree_util.tree_leaves_with_path(nn.unbox(variables))
    if any(not isinstance(getattr(part, 'key', ''), str) for path, _ in paths for part in path):
        raise errors.UserError(
            f'model.name is {name!r}, which has modules in lists; expected a name for each. Assign '
            'them by setattr(self, NAME, MODULE)'
        )
    return out.shape[1]
