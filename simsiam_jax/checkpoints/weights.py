"""Weights to start from or to convert: of a run's checkpoint or of a file."""

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
from etils import epath

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader, weight_files
from simsiam_jax.models import pytorch, pytorch_heads
from simsiam_jax.runtime import storage
from simsiam_jax.training.step import TrainState

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights by part of the network: backbone, and projector and predictor where there are any.

    Attributes:
      origin: where they are from, for messages.
      params, batch_stats: part -> tree of NumPy arrays.
      config: of the run; of a file see file_config.
      parts: as the file has them, part -> arrays under PyTorch's names; {} for a run.
    """

    origin: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    config: dict[str, Any]
    parts: dict[str, pytorch.Arrays] = dataclasses.field(default_factory=dict)


def part(weights: Weights, name: str) -> dict[str, Any]:
    """{'params', 'batch_stats'} of a part."""
    return {
        'params': weights.params[name],
        'batch_stats': weights.batch_stats.get(name, {}),
    }


def is_file(path: Path) -> bool:
    """Whether the path is one of a file of weights, not of a run; it need not exist."""
    if weight_files.ending(path):
        return True
    place = storage.folder(path)
    with storage.reading(path):
        return place.is_file() or any((place / name).exists() for name in weight_files.FOLDERS)


def open_weights(path: Path, step: int | None = None) -> Weights:
    """The weights of a run's checkpoint (None: the latest) or of a file.

    Raises:
      UserError: there are none, or the file cannot be read, is damaged or of another network.
    """
    return from_file(path) if is_file(path) else _from_run(path, step)


def _from_run(path: Path, step: int | None) -> Weights:
    # Momenta, as large, stay where they are.
    found = checkpoint_reader.load(path, 'state', step=step, keys=('params', 'batch_stats'))
    return Weights(str(path), found.tree['params'], found.tree['batch_stats'], found.run.config)


def from_file(path: Path) -> Weights:
    """The weights of a file that PyTorch's users have, or of a backbone's .msgpack.

    Raises:
      UserError: the file cannot be read, or is of another network.
    """
    origin = os.fspath(path)
    arrays, arch = weight_files.read(path)
    parts = pytorch.split(arrays, origin)
    model, channels = pytorch.identify(parts['backbone'], origin)
    if arch and arch != model['name']:
        raise errors.UserError(
            f'{origin} says that it is a {arch}, but its weights are those of a {model["name"]}'
        )
    found = {'backbone': pytorch.backbone_from_torch(parts['backbone'], origin)}
    method = {}
    if 'projector' in parts:
        for name in ('projector', 'predictor'):
            found[name] = pytorch_heads.from_torch(parts[name], origin)
        method = pytorch_heads.simsiam_arguments(
            pytorch_heads.mlp_of(found['projector']), pytorch_heads.mlp_of(found['predictor'])
        )
    config = file_config(model, channels, method)
    config['augment'] |= _images(path)
    return Weights(
        origin,
        {name: variables['params'] for name, variables in found.items()},
        {name: variables['batch_stats'] for name, variables in found.items()},
        config,
        parts,
    )


def file_config(model: dict[str, Any], channels: int, method: dict[str, Any]) -> dict[str, Any]:
    """A configuration for what a file holds: the default one with its model, channels and method.

    Size and normalization of the images are ImageNet's: files do not say them. (A folder of
    timm's does, and from_file takes them from there.)
    """
    from simsiam_jax import config as config_lib  # it needs ml_collections

    config = config_lib.default().to_dict()
    config['model'] |= {**model, 'dtype': 'float32'}
    config['method'] |= method
    config['data']['channels'] = channels
    if channels != 3:  # one figure serves all channels
        config['augment'] |= {'mean': (0.449,), 'std': (0.226,)}
    return config


def _images(path: Path) -> dict[str, Any]:
    """size, mean and std of the images, as far as a folder of timm's says them."""
    described = epath.Path(path) / 'config.json'
    if not described.exists():
        return {}
    try:
        given = json.loads(described.read_text()).get('pretrained_cfg', {})
        found: dict[str, Any] = {key: tuple(given[key]) for key in ('mean', 'std') if key in given}
        return found | ({'size': given['input_size'][-1]} if 'input_size' in given else {})
    except (ValueError, TypeError, AttributeError) as error:
        raise errors.UserError(
            f'{described} is damaged ({error}); remove it for the figures of ImageNet'
        ) from error


def load_into_state(state: TrainState, weights: Weights) -> tuple[TrainState, str]:
    """The state with the weights in it, and a line that says which parts.

    A momentum target starts from them too. Projector and predictor are taken where they fit.

    Raises:
      UserError: the backbone has other shapes.
    """
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    taken, left = [], [name for name in weights.params if name not in params]
    for name in params:
        if name not in weights.params:
            continue
        given = part(weights, name)
        wanted = {'params': params[name], 'batch_stats': batch_stats.get(name, {})}
        if _shapes(given) != _shapes(wanted):
            left.append(name)
            continue
        taken.append(name)
        params[name] = given['params']
        if name in batch_stats:
            batch_stats[name] = given['batch_stats']
    if 'backbone' not in taken:
        model, channels = weights.config['model'], weights.config['data']['channels']
        keys = ('name', 'stem', 'width_multiplier', 'stages')
        raise errors.UserError(
            f'the backbone of {weights.origin} does not fit config.model; it has '
            + ', '.join(f'model.{key}={model[key]}' for key in keys)
            + f', data.channels={channels}: set these'
        )
    target = state.target
    if target is not None:
        target = {'params': params, 'batch_stats': batch_stats}
    initial = [name for name in params if name not in taken]
    text = f'{", ".join(taken)} from {weights.origin}'
    if initial:
        text += f'; at random: {", ".join(initial)}'
    if left:
        text += f'; not taken, absent or of other shapes here: {", ".join(left)}'
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats, target=target)
    return state, text


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
