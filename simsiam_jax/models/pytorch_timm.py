"""Names and layouts of timm's Vision Transformers and ConvNeXts, both ways, without PyTorch."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from simsiam_jax import errors
from simsiam_jax.models import backbones, convnext, pytorch, pytorch_layouts, vit

# An array of each kind of network, by which a file is recognized.
_MARKS = {'vit': 'patch_embed.proj.weight', 'convnext': 'stages.0.blocks.0.conv_dw.weight'}
# timm's ConvNeXts whose MLPs are 1x1 convolutions.
_CONV_MLP = ('convnext_atto', 'convnext_femto', 'convnext_pico', 'convnext_nano')
_HEAD = re.compile(r'head\.(?!norm\.)')  # of a classifier or a method
_LEAVES = {'kernel': 'weight', 'scale': 'weight'}


class Selection(NamedTuple):
    """The network of a file.

    Attributes:
      arrays: Arrays under timm's names, without the classifier.
      prefix: Prefix of the network in the file; '' or ends with a dot.
      left_out: First words of the names of the other arrays.
    """

    arrays: pytorch.Arrays
    prefix: str
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Returns which network was loaded, and what was left out; '' if the file is a backbone."""
        return pytorch.describe(self.prefix, self.left_out)


def select(arrays: pytorch.Arrays, origin: str, wanted: str | None = None) -> Selection | None:
    """Selects the ViT or ConvNeXt of a file; returns None if it has none.

    Args:
      arrays: Arrays of a file by name.
      origin: Name of the file, for messages.
      wanted: Prefix of the network; None expects a single one.

    Raises:
      UserError: There are several.
    """
    marks = tuple(_MARKS.values())
    found = {name: mark for name in arrays for mark in marks if f'.{name}'.endswith(f'.{mark}')}
    prefixes = sorted(name.removesuffix(mark) for name, mark in found.items())
    if wanted is not None:
        prefixes = [prefix for prefix in prefixes if prefix.rstrip('.') == wanted.rstrip('.')]
    if not prefixes:
        return None
    prefixes = pytorch_layouts.prefer(prefixes)
    if len(prefixes) > 1:
        raise errors.UserError(
            f'several networks in {origin}: {", ".join(p.rstrip(".") or "-" for p in prefixes)}; '
            f'expected one. Choose one by its prefix, {origin}#{prefixes[-1].rstrip(".")}'
        )
    (prefix,) = prefixes
    named = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix) and not _HEAD.match(name.removeprefix(prefix))
    }
    others = (name.removeprefix(prefix) for name in arrays)
    left_out = dict.fromkeys(name.partition('.')[0] for name in others if name not in named)
    return Selection(named, prefix, tuple(left_out))


def identify(
    arrays: pytorch.Arrays, origin: str, heads: int | None = None
) -> tuple[dict[str, Any], int, int | None]:
    """Returns name and arguments of the network, the channels and the size of the images.

    Args:
      arrays: Arrays under timm's names; only names and shapes are used.
      origin: Name of the file, for messages.
      heads: Number of attention heads of a ViT; None is one for 64 channels, as in timm.

    Returns:
      Keys of config.model, number of channels, and the side of the images of a ViT; None for a
      ConvNeXt, which takes any.

    Raises:
      UserError: The network is none of this package's.
    """
    if _MARKS['vit'] not in arrays:
        return _identify_convnext(arrays)
    kernel = arrays[_MARKS['vit']]
    width, channels, patch_size = kernel.shape[:3]
    if 'cls_token' not in arrays or 'pos_embed' not in arrays:
        raise errors.UserError(
            f'{origin} is a Vision Transformer without class token or position embedding; expected '
            f'both. Use one of {", ".join(vit.SIZES)}'
        )
    if heads is None and width % 64:
        raise errors.UserError(
            f'{origin} is a Vision Transformer of width {width} that does not state its number of '
            'attention heads; expected a width that 64 divides'
        )
    side = round((arrays['pos_embed'].shape[1] - 1) ** 0.5)
    blocks = {name.split('.')[1] for name in arrays if name.startswith('blocks.')}
    sizes = {'width': width, 'depth': len(blocks), 'heads': heads or width // 64}
    hidden = arrays['blocks.0.mlp.fc1.weight'].shape[0]
    name = next((name for name, known in vit.SIZES.items() if known == sizes), '')
    arguments: dict[str, Any] = {} if name else dict(sizes)
    changes = {
        'patch_size': (patch_size, 16),
        'mlp_ratio': (hidden / width, 4.0),
        'pool': ('avg' if 'fc_norm.weight' in arrays else 'token', 'token'),
    }
    arguments |= {key: given for key, (given, default) in changes.items() if given != default}
    model = {'name': name or 'vit_tiny', 'arguments': arguments}
    return model, channels, side * patch_size


def _identify_convnext(arrays: pytorch.Arrays) -> tuple[dict[str, Any], int, None]:
    stem = arrays['stem.0.weight']
    depths: dict[int, int] = {}
    for name in arrays:
        if match := re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    widths = tuple(arrays[f'stages.{i}.blocks.0.conv_dw.weight'].shape[0] for i in sorted(depths))
    sizes = {'depths': tuple(depths[i] for i in sorted(depths)), 'widths': widths}
    name = next((name for name, known in convnext.SIZES.items() if known == sizes), '')
    arguments: dict[str, Any] = {} if name else dict(sizes)
    if stem.shape[-1] != 4:
        arguments['patch_size'] = stem.shape[-1]
    return {'name': name or 'convnext_tiny', 'arguments': arguments}, stem.shape[1], None


def from_torch(
    arrays: pytorch.Arrays, origin: str, model: Mapping[str, Any], channels: int, size: int
) -> dict[str, Any]:
    """Returns {'params', 'batch_stats'} of the network that `identify` returned.

    Args:
      arrays: Arrays under timm's names.
      origin: Name of the file, for messages.
      model: Keys of config.model.
      channels: Number of channels of the images.
      size: Side of the images.

    Raises:
      UserError: Arrays are missing, unexpected or of a different shape.
    """
    expected = abstract_params(model, channels, size)
    names = {path: _name(path) for path in expected}
    flat = {
        path: _from_layout(name, arrays[name]) for path, name in names.items() if name in arrays
    }
    misshaped = {names[path] for path, x in flat.items() if x.shape != expected[path].shape}
    message = f'{origin} does not match {model["name"]}'
    pytorch.check_names(set(arrays), set(names.values()), misshaped, message, backbones.NETWORKS)
    return {'params': traverse_util.unflatten_dict(flat), 'batch_stats': {}}


def abstract_params(
    model: Mapping[str, Any], channels: int, size: int
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns the shapes of the weights by path, for images [size, size, channels]."""
    config = {
        'model': {'dtype': 'float32', 'remat': False, **model},
        'augment': {'size': size},
        'data': {'channels': channels},
    }
    module = backbones.from_config(config)
    image = jnp.zeros((1, size, size, channels))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image))
    return traverse_util.flatten_dict(shapes['params'])


def to_torch(variables: Mapping[str, Any], name: str = '') -> pytorch.Arrays:
    """Returns the arrays under timm's names in PyTorch's layouts.

    Args:
      variables: Variables of a ViT or ConvNeXt.
      name: Name of the network; timm's smallest ConvNeXts have 1x1 convolutions in their MLPs.
    """
    flat = traverse_util.flatten_dict(dict(variables['params']))
    arrays = {}
    for path, array in flat.items():
        key, value = _name(path), pytorch.to_layout(np.asarray(array, np.float32))
        if name in _CONV_MLP and '.mlp.' in key and value.ndim == 2:
            value = value[:, :, None, None]
        arrays[key] = value
    return arrays


def is_built_in(params: Mapping[str, Any]) -> bool:
    """Returns whether the weights are those of a ViT or ConvNeXt of this package."""
    return 'cls_token' in params or 'stem_conv' in params


def model_arguments(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns timm's name of the architecture and the arguments of timm.create_model for it.

    Args:
      config: Configuration of a ViT or ConvNeXt.
    """
    network = backbones.from_config(config).build(None)
    name, channels = config['model']['name'], config['data']['channels']
    arguments: dict[str, Any] = {'in_chans': channels, 'patch_size': network.patch_size}
    if isinstance(network, vit.ViT):
        arguments |= {
            'img_size': network.image_size,
            'embed_dim': network.width,
            'depth': network.depth,
            'num_heads': network.heads,
            'mlp_ratio': network.mlp_ratio,
            'global_pool': network.pool,
        }
        return f'{name}_patch16_224', arguments
    arguments |= {'depths': list(network.depths), 'dims': list(network.widths)}
    return name, arguments


def _name(path: tuple[str, ...]) -> str:
    name = '.'.join((*path[:-1], _LEAVES.get(path[-1], path[-1])))
    for pattern, replacement in (
        (r'^(frozen_)?patch_embed\.', 'patch_embed.proj.'),
        (r'^blocks_(\d+)\.', r'blocks.\1.'),
        (r'^(blocks\.\d+)\.(qkv|proj)\.', r'\1.attn.\2.'),
        (r'^stages_(\d+)_blocks_(\d+)\.', r'stages.\1.blocks.\2.'),
        (r'^((?:blocks\.\d+|stages\.\d+\.blocks\.\d+))\.(fc\d)\.', r'\1.mlp.\2.'),
        (r'^stages_(\d+)_downsample_norm\.', r'stages.\1.downsample.0.'),
        (r'^stages_(\d+)_downsample_conv\.', r'stages.\1.downsample.1.'),
        (r'^stem_conv\.', 'stem.0.'),
        (r'^stem_norm\.', 'stem.1.'),
        (r'^head_norm\.', 'head.norm.'),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _from_layout(name: str, array: np.ndarray) -> np.ndarray:
    if '.mlp.' in name and array.ndim == 4:
        array = array[:, :, 0, 0]
    return pytorch.from_layout(array)
