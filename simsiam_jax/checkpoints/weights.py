"""Weights to start from or to convert, loaded from a run's checkpoint or a weight file."""

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader, weight_files
from simsiam_jax.models import pytorch, pytorch_heads, pytorch_layouts, pytorch_timm, resnet
from simsiam_jax.runtime import storage
from simsiam_jax.training.step import TrainState

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights by part of the network: the backbone, and the projector and predictor if any.

    Attributes:
      origin: Path that the weights are from, for messages.
      params: Part -> tree of NumPy arrays.
      batch_stats: Part -> tree of NumPy arrays.
      config: Configuration of the run; for a file that of file_config().
      parts: Part -> arrays of the file under PyTorch's names; {} for a run.
      assumed: What the file does not state about its images and is therefore ImageNet's; '' if it
        states all.
      selection: Which network of the file these are, and what was left out; '' if it is a backbone.
    """

    origin: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    config: dict[str, Any]
    parts: dict[str, pytorch.Arrays] = dataclasses.field(default_factory=dict)
    assumed: str = ''
    selection: str = ''


def part(weights: Weights, name: str) -> dict[str, Any]:
    """Returns {'params', 'batch_stats'} of a part of the network."""
    return {
        'params': weights.params[name],
        'batch_stats': weights.batch_stats.get(name, {}),
    }


def is_file(path: Path) -> bool:
    """Returns whether the path is a weight file, not a run. It need not exist."""
    path, _ = _split_prefix(path)
    if weight_files.ending(path):
        return True
    file = storage.folder(path)
    with storage.reading(path):
        return file.is_file() or any((file / name).exists() for name in weight_files.FOLDERS)


def _split_prefix(path: Path) -> tuple[str, str | None]:
    """Splits FILE#PREFIX, which selects one of a file's networks; without it, PREFIX is None."""
    file, mark, prefix = os.fspath(path).rpartition('#')
    return (file, prefix) if mark and weight_files.ending(file) else (os.fspath(path), None)


def open_weights(path: Path, step: int | None = None) -> Weights:
    """Loads the weights of a run's checkpoint or of a file.

    Args:
      path: Workdir of a run, or a weight file as in from_file.
      step: Step of the checkpoint; None loads the latest.

    Raises:
      UserError: There are no weights, or they are unreadable, damaged or of a different network.
    """
    return from_file(path) if is_file(path) else _from_run(path, step)


def _from_run(path: Path, step: int | None) -> Weights:
    # The optimizer's momenta are as large as the weights, so they are not loaded.
    item = checkpoint_reader.load(path, 'state', step=step, keys=('params', 'batch_stats'))
    batch_stats = item.tree.get('batch_stats', {})
    return Weights(str(path), item.tree['params'], batch_stats, item.run.config)


def from_file(path: Path) -> Weights:
    """Loads the weights of a PyTorch or safetensors file, or of a backbone's .msgpack.

    Args:
      path: Weight file, or FILE#PREFIX for one of its networks.

    Raises:
      UserError: The file cannot be read, is damaged, or has a different network or several.
    """
    origin, prefix = _split_prefix(path)
    arrays, arch = weight_files.read(origin)
    if timm := pytorch_timm.select(arrays, origin, prefix):
        return _from_timm(timm, origin)
    selection = pytorch_layouts.select(arrays, origin, prefix)
    parts = selection.parts
    model, channels = pytorch.identify(parts['backbone'], origin)
    # timm states a class, resnet, or a name such as timm/resnet50.a1_in1k.
    if arch.rpartition('/')[2].partition('.')[0] not in ('', 'resnet', model['name']):
        raise errors.UserError(
            f'{origin} states that it is a {arch}, but its weights are those of a {model["name"]}'
        )
    loaded = {'backbone': pytorch.backbone_from_torch(parts['backbone'], origin)}
    method = {}
    if 'projector' in parts:
        for name in ('projector', 'predictor'):
            loaded[name] = pytorch_heads.from_torch(parts[name], origin)
        method = pytorch_heads.simsiam_arguments(
            pytorch_heads.mlp_of(loaded['projector']), pytorch_heads.mlp_of(loaded['predictor'])
        )
    if model['stem'] == 'cifar' and selection.beside('classifier'):
        errors.warn_once(
            f'{origin} has the names of solo-learn, which pads the images of a 3x3 stem by 2 '
            "pixels and not by 1. If it is solo-learn's, pad normalized images by 1 more, with 0"
        )
    images = _images(origin)
    config = file_config(model, channels, method, images)
    return Weights(
        origin,
        {name: variables['params'] for name, variables in loaded.items()},
        {name: variables['batch_stats'] for name, variables in loaded.items()},
        config,
        parts,
        ', '.join(key for key in ('size', 'mean', 'std') if key not in images),
        str(selection),
    )


def _from_timm(selection: pytorch_timm.Selection, origin: str) -> Weights:
    """Returns the ViT or ConvNeXt of a file."""
    images = _images(origin)
    heads = images.pop('heads', None)
    model, channels, size = pytorch_timm.identify(selection.arrays, origin, heads)
    if size is not None:  # of its position embedding
        images['size'] = size
    config = file_config(model, channels, {}, images)
    loaded = pytorch_timm.from_torch(
        selection.arrays, origin, model, channels, config['augment']['size']
    )
    return Weights(
        origin,
        {'backbone': loaded['params']},
        {'backbone': {}},
        config,
        {'backbone': selection.arrays},
        ', '.join(key for key in ('size', 'mean', 'std') if key not in images),
        str(selection),
    )


def file_config(
    model: dict[str, Any], channels: int, method: dict[str, Any], images: dict[str, Any]
) -> dict[str, Any]:
    """Returns a configuration for the weights of a file, based on the default configuration.

    Args:
      model: Section of the configuration: the keys that the file determines.
      channels: Number of channels of the images.
      method: Section of the configuration: the keys that the file determines.
      images: Size, resize, mean and std of the images; ImageNet's where missing.
    """
    from simsiam_jax import config as config_lib  # needs ml_collections

    config = config_lib.default().to_dict()
    config['model'] |= {**model, 'dtype': 'float32'}
    config['method'] |= method
    # A file states no range, and one that is measured would depend on the images at hand.
    config['data'] |= {'channels': channels, 'range': 'dtype'}
    if channels != 3:  # a single value applies to all channels
        config['augment'] |= {'mean': (0.449,), 'std': (0.226,)}
    augment = config['augment']
    augment |= {key: images[key] for key in ('size', 'mean', 'std') if key in images}
    config['eval']['resize'] = images.get('resize') or config_lib.resize_of(augment['size'])
    return config


def warn_of_assumed(weights: Weights) -> None:
    """Prints which network of the file was loaded, and what it does not state about its images."""
    if weights.selection:
        errors.warn_once(f'loaded the backbone of {weights.origin} ({weights.selection})')
    if not weights.assumed:
        return
    augment = weights.config['augment']
    values = ', '.join(f'{key} {augment[key]}' for key in weights.assumed.split(', '))
    errors.warn_once(
        f"{weights.origin} does not state {weights.assumed} of its images; assumed ImageNet's: "
        f'{values}. If they differ, set --config.augment.size and so on'
    )


def _images(path: Path) -> dict[str, Any]:
    """Returns size, resize, mean and std of the images, as far as the file states them."""
    file = storage.folder(path) / 'config.json'
    try:
        if not file.exists():
            return weight_files.read_images(path)
        content = json.loads(file.read_text())
        given = content.get('pretrained_cfg', {})
        images: dict[str, Any] = {key: tuple(given[key]) for key in ('mean', 'std') if key in given}
        if 'input_size' in given:
            images['size'] = given['input_size'][-1]
            if heads := content.get('model_args', {}).get('num_heads'):
                images['heads'] = heads
            if 'crop_pct' in given:
                images['resize'] = round(images['size'] / given['crop_pct'])
        return images
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise errors.UserError(
            f"{file} is damaged: {error}. Remove it to use ImageNet's size, mean and std"
        ) from error


def load_into_state(state: TrainState, weights: Weights) -> tuple[TrainState, str]:
    """Returns the state with the weights loaded, and a message about which parts were loaded.

    A momentum target starts from the same weights. The projector and predictor are loaded if their
    shapes match.

    Args:
      state: State before training.
      weights: Weights to load.

    Raises:
      UserError: The backbone has different shapes.
    """
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    loaded, skipped = [], [name for name in weights.params if name not in params]
    for name in params:
        if name not in weights.params:
            continue
        given = part(weights, name)
        expected = {'params': params[name], 'batch_stats': batch_stats.get(name, {})}
        if _shapes(given) != _shapes(expected):
            skipped.append(name)
            continue
        loaded.append(name)
        params[name] = given['params']
        if name in batch_stats:
            batch_stats[name] = given['batch_stats']
    if 'backbone' not in loaded:
        model, channels = weights.config['model'], weights.config['data']['channels']
        keys = ['name', 'stem', 'width_multiplier', 'stages']
        if model['name'] not in resnet.RESNETS:
            keys = ['name', 'arguments']
        raise errors.UserError(
            f'the backbone of {weights.origin} does not fit config.model. Set '
            + ', '.join(f'model.{key}={model[key]}' for key in keys)
            + f', data.channels={channels}'
        )
    target = state.target
    if target is not None:
        target = {'params': params, 'batch_stats': batch_stats}
    initial = [name for name in params if name not in loaded]
    text = f'loaded {", ".join(loaded)} from {weights.origin}'
    if weights.selection:
        text += f' ({weights.selection})'
    if initial:
        text += f'; random initialization: {", ".join(initial)}'
    if skipped:
        text += f'; skipped, missing or of a different shape in this run: {", ".join(skipped)}'
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats, target=target)
    return state, text


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
