"""Backbones: built in, from an import path, or given as an object.

A network has ``__call__(images, train) -> features``: normalized images [B, H, W, C] to [B, D]. Its
variables are params and, with BN, batch_stats.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from simsiam_jax import errors, import_path
from simsiam_jax.models import convnext, network_contract, resnet, vit

# Built-in networks besides ResNets, each from a function like those of an import path.
NETWORKS = vit.NETWORKS | convnext.NETWORKS
OBJECT = 'object'  # model.name of a network given as an object, before a colon

_RESNET_KEYS = ('stem', 'width_multiplier', 'stages')
_given: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar('given', default=None)


class _Builder:
    """Builds a network for a mesh axis, once for each axis.

    Flax makes modules that are built while another module runs a part of it. Networks are
    therefore built before, by Backbone.__post_init__.
    """

    def __init__(self, make: Callable[[str | None], nn.Module]):
        self._make = make
        self._networks: dict[str | None, nn.Module] = {}

    def __call__(self, axis_name: str | None) -> nn.Module:
        if axis_name not in self._networks:
            self._networks[axis_name] = self._make(axis_name)
        return self._networks[axis_name]


class Backbone(nn.Module):
    """A network other than a ResNet, with what the methods need to know of it.

    Its variables are those of the network, without a level above.

    Attributes:
      build: Function axis_name -> network.
      features: Width D of the features.
      dtype: Type of the computation in the heads.
      axis_name: Mesh axis over which BN is synchronized in training; None for a single device.
    """

    build: Callable[[str | None], nn.Module]
    features: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self) -> None:
        for axis in (None, self.axis_name):
            self.build(axis)
        super().__post_init__()

    def setup(self) -> None:
        # The first variables are made outside of the mesh.
        self.network = self.build(None if self.is_initializing() else self.axis_name)
        nn.share_scope(self, self.network)

    def __call__(
        self, images: Num[Array | np.ndarray, 'B H W C'], train: bool = False
    ) -> Float[Array, 'B D']:
        """Returns the features of a batch of normalized images in float32."""
        features = self.network(jnp.asarray(images, jnp.float32), train=train)
        return features.astype(jnp.float32)


AnyBackbone = resnet.ResNet | Backbone


def from_config(
    config: Mapping[str, Any], *, axis_name: str | None = None, **changes: Any
) -> AnyBackbone:
    """Returns the backbone of a configuration.

    Args:
      config: Configuration of pre-training, as a dict or ConfigDict.
      axis_name: Mesh axis over which BN is synchronized in training; None for a single device.
      **changes: Keys of `model` to change.

    Raises:
      UserError: The network is unknown, cannot be built, or does not meet the contract.
    """
    model = {**config['model'], **changes}
    arguments = {key: _plain(value) for key, value in model.pop('arguments', {}).items()}
    name = model['name']
    if name in resnet.RESNETS:
        if arguments:
            raise errors.UserError(
                f'model.arguments is {arguments}, but {name} takes none. Remove them, or set the '
                'other keys of config.model'
            )
        return errors.build('model', resnet.make, model, axis_name=axis_name)
    errors.check_choice('model.dtype', model['dtype'], ('float32', 'bfloat16'))
    size, channels = config['augment']['size'], config['data']['channels']
    if name.partition(':')[0] == OBJECT:
        make = functools.partial(_from_object, _find_object(name))
    else:
        make = functools.partial(_call, name, _function(name), arguments, model, size)
    build = _Builder(make)
    features = network_contract.check(name, build(None), size, channels)
    return Backbone(build, features, jnp.dtype(model['dtype']), axis_name)


def is_portable(name: str) -> bool:
    """Returns whether PyTorch has the network, so that weights can be converted."""
    return name in resnet.RESNETS or name in NETWORKS


def can_remat(name: str) -> bool:
    """Returns whether a network can recompute its blocks in the backward pass."""
    if ':' not in name or name.startswith(f'{OBJECT}:'):
        return is_portable(name)
    return import_path.takes(_function(name), 'remat')


def attention_heads(config: Mapping[str, Any]) -> int:
    """Returns the number of attention heads of a configuration's ViT; 0 for other networks."""
    if config['model']['name'] not in NETWORKS:
        return 0
    return getattr(from_config(config).build(None), 'heads', 0)


def ignored_keys(model: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Returns a warning if keys of ResNets are set that the network does not read; otherwise ''.

    Args:
      model: Section of the configuration.
      default: The same section of the default configuration.
    """
    if model['name'] in resnet.RESNETS:
        return ''
    changed = [f'model.{key}' for key in _RESNET_KEYS if model[key] != default[key]]
    return f'{", ".join(changed)}: only for ResNets, not for {model["name"]}' if changed else ''


@contextlib.contextmanager
def provide(network: Any) -> Iterator[str]:
    """Lets from_config find a network given as an object, within this context.

    Args:
      network: Flax module; None provides none.

    Yields:
      The value of model.name for it; '' for None.

    Raises:
      UserError: It is not a Linen module.
    """
    if network is None:
        yield ''
        return
    if not isinstance(network, nn.Module):
        raise errors.UserError(network_contract.not_linen('backbone', network))
    token = _given.set(network)
    try:
        yield f'{OBJECT}:{type(network).__name__}'
    finally:
        _given.reset(token)


def init(module: nn.Module, key: Array, images: Any) -> dict[str, Any]:
    """Returns random {'params', 'batch_stats'} of a backbone for images [B, H, W, C]."""
    variables = nn.unbox(module.init({'params': key, 'dropout': key}, images))
    return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}


def _plain(value: Any) -> Any:
    # Stored configurations have lists in place of tuples, and Linen modules must be hashable.
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _function(name: str) -> Callable[..., Any]:
    if ':' in name:
        return import_path.load('model.name', name)
    if name not in NETWORKS:
        known = [*resnet.RESNETS, *NETWORKS]
        raise errors.UserError(
            f'model.name is {name!r}; {errors.suggestion(name, known)} Own networks have an import '
            'path, PACKAGE.MODULE:FUNCTION'
        )
    return NETWORKS[name]


def _call(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    model: dict[str, Any],
    size: int,
    axis_name: str | None,
) -> nn.Module:
    """Calls the function of a network with the arguments, and the values that it takes."""
    values = {
        'dtype': jnp.dtype(model['dtype']),
        'remat': model['remat'],
        'image_size': size,
        'axis_name': axis_name,
    }
    import_path.check_arguments('model.arguments', function, arguments, values)
    taken = {key: x for key, x in values.items() if import_path.takes(function, key)}
    if model['remat'] and 'remat' not in taken:
        raise errors.UserError(f'model.remat is True, but {name} has no argument remat. Set False')
    try:
        network = function(**arguments, **taken)
    except errors.UserError:
        raise
    except Exception as error:  # any type: the function is a program of the user
        raise errors.UserError(
            f'model.name is {name!r}, but the call with {arguments} failed: '
            f'{type(error).__name__}: {errors.reason(error)}. Set config.model.arguments'
        ) from error
    if not isinstance(network, nn.Module):
        raise errors.UserError(network_contract.not_linen(f'model.name {name!r}', network))
    return network


def _from_object(network: nn.Module, axis_name: str | None) -> nn.Module:
    return network.clone(axis_name=axis_name) if hasattr(network, 'axis_name') else network


def _find_object(name: str) -> nn.Module:
    given = _given.get()
    if given is None or name != f'{OBJECT}:{type(given).__name__}':
        other = f' (given: {type(given).__name__})' if given is not None else ''
        raise errors.UserError(
            f'the network is {name.partition(":")[2]}, which was given to pretrain() as an object '
            f'and is not stored{other}. Pass it again by backbone=, such as '
            'Encoder.load(PATH, backbone=NETWORK), or train with an import path in model.name'
        )
    return given
