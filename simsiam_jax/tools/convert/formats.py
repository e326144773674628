"""Writes weights in the formats of tools.convert."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import export

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader, weight_files
from simsiam_jax.checkpoints.weights import Weights, part
from simsiam_jax.data import jax_augment
from simsiam_jax.models import backbones, pytorch, pytorch_heads, pytorch_timm, resnet
from simsiam_jax.tools.convert import model_card
from simsiam_jax.training.step import TrainState

Parts = dict[str, pytorch.Arrays]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
      write: Function (weights, the same weights under PyTorch's names, target).
      endings: Allowed endings of the target's name; () allows any.
      library: Library whose networks it is for; '' allows any ResNet of this package.
      heads: Whether projector and predictor are written too.
      ours: Whether the format has this package's own names, so that there is no network of
        PyTorch to compare with.
    """

    write: Callable[[Weights, Parts, str], None]
    endings: tuple[str, ...] = ()
    library: str = ''
    heads: bool = False
    ours: bool = False


def check(format_: Format, weights: Weights, target: str) -> None:
    """Raises UserError unless the format can represent the weights and allows the target's name."""
    if not target.endswith(format_.endings or ('',)):
        raise errors.UserError(
            f'invalid --target: {target}; expected a name in {", ".join(format_.endings)}'
        )
    name = weights.config['model']['name']
    if not backbones.is_portable(name) and not format_.ours:
        ours = ', '.join(key for key, x in FORMATS.items() if x.ours)
        raise errors.UserError(
            f'PyTorch has no network {name}, so its weights cannot be converted; use --format= one '
            f'of {ours}'
        )
    if format_.library:
        check_standard(weights, format_.library)


def to_torch(weights: Weights) -> Parts:
    """Returns backbone, and projector and predictor if both exist, under PyTorch's names."""
    name = weights.config['model']['name']
    if not backbones.is_portable(name):
        return {}
    if name in backbones.NETWORKS:  # no format of PyTorch has heads for it
        return {'backbone': pytorch_timm.to_torch(part(weights, 'backbone'), name)}
    parts = {'backbone': pytorch.backbone_to_torch(part(weights, 'backbone'))}
    if {'projector', 'predictor'} <= set(weights.params):
        projector = pytorch_heads.to_torch(part(weights, 'projector'), output_bias=True)
        predictor = pytorch_heads.to_torch(part(weights, 'predictor'))
        parts |= {'projector': projector, 'predictor': predictor}
    return parts


def check_standard(weights: Weights, library: str) -> None:
    """Raises UserError, with a format to use instead, unless the library has the network."""
    model, channels = weights.config['model'], weights.config['data']['channels']
    name, cifar = model['name'], model['stem'] == 'cifar'
    if name in backbones.NETWORKS:
        if library != 'timm':
            raise errors.UserError(f'{library} has no {name}; use --format=timm or state_dict')
        if name.startswith('convnext'):
            _check_convnext(model['arguments'])
        return
    if model['width_multiplier'] != 1 or model['stages']:
        raise errors.UserError(
            f'{library} has no {name} of model.width_multiplier={model["width_multiplier"]} and '
            f'model.stages={list(model["stages"])}; use --format=state_dict, which writes the same '
            'names'
        )
    if cifar or (channels != 3 and library != 'Detectron2'):
        shape = f'{channels}, 64, ' + ('3, 1, 1' if cifar else '7, 2, 3')
        raise errors.UserError(
            f'{library} has no {name} with a {model["stem"]} stem for {channels} channels; '
            'use --format=state_dict, which loads into: '
            f'net = torchvision.models.{name}(); net.conv1 = torch.nn.Conv2d({shape}, bias=False)'
            + ('; net.maxpool = torch.nn.Identity()' if cifar else '')
        )


def _check_convnext(arguments: dict[str, Any]) -> None:
    """Raises UserError if timm builds another network from these arguments."""
    stages = len(arguments.get('depths', (1,) * 4))
    if stages != 4:
        raise errors.UserError(
            f'timm has no ConvNeXt of {stages} stages, only of 4; use --format=state_dict'
        )
    if arguments.get('patch_size') == 2:
        raise errors.UserError(
            "in timm's ConvNeXts patches of 2 halve the resolution once more; use "
            '--format=state_dict'
        )


def _stated_images(weights: Weights) -> dict[str, Any]:
    """Returns the description of the images, without what was assumed."""
    images = weight_files.describe_images(weights.config)
    assumed = weights.assumed.split(', ')
    assumed += ['resize'] * ('size' in assumed)
    if heads := backbones.attention_heads(weights.config):
        images['heads'] = heads
    return {key: value for key, value in images.items() if key not in assumed}


def write_state_dict(weights: Weights, parts: Parts, target: str) -> None:
    images = _stated_images(weights)
    weight_files.write(target, parts['backbone'], images)


# First and last layer by the first word of a network's name in timm.
_ENDS = {name: {'first_conv': 'conv1', 'classifier': 'fc'} for name in resnet.RESNETS} | {
    'vit': {'first_conv': 'patch_embed.proj', 'classifier': 'head'},
    'convnext': {'first_conv': 'stem.0', 'classifier': 'head.fc'},
}


def write_timm(weights: Weights, parts: Parts, target: str) -> None:
    config = weights.config
    images, name = weight_files.describe_images(config), config['model']['name']
    size = images['size']
    arguments: dict[str, Any] = {}
    if name in backbones.NETWORKS:
        name, arguments = pytorch_timm.model_arguments(config)
    timm_config = {
        'architecture': name,
        'num_classes': 0,
        'num_features': backbones.from_config(config).features,
        'pretrained_cfg': {
            'input_size': [config['data']['channels'], size, size],
            'mean': images['mean'],
            'std': images['std'],
            'interpolation': 'bilinear',
            'crop_pct': size / images['resize'],
            'num_classes': 0,
            **_ENDS[name.partition('_')[0]],
        },
    } | ({'model_args': arguments} if arguments else {})
    folder = pathlib.Path(target)
    weight_files.write(str(folder / 'model.safetensors'), parts['backbone'])
    text = json.dumps(timm_config, indent=2) + '\n'
    weight_files.write_bytes(str(folder / 'config.json'), text.encode())


def write_huggingface(weights: Weights, parts: Parts, target: str) -> None:
    """Writes timm's files, which load_encoder opens for any network, and a model card."""
    write_timm(weights, parts, target)
    try:
        check_standard(weights, 'timm')
        in_timm = True
    except errors.UserError:
        in_timm = False
    width = backbones.from_config(weights.config).features
    card = model_card.text(weights, width, in_timm=in_timm)
    weight_files.write_bytes(str(pathlib.Path(target) / 'README.md'), card.encode())


def write_detectron2(weights: Weights, parts: Parts, target: str) -> None:
    arrays = pytorch.to_detectron2(parts['backbone'])
    content = {'model': arrays, '__author__': 'simsiam_jax', 'matching_heuristics': True}
    weight_files.write(target, content)


def write_simsiam(weights: Weights, parts: Parts, target: str) -> None:
    prefixes = {
        'backbone': 'module.encoder.',
        'projector': 'module.encoder.fc.',
        'predictor': 'module.predictor.',
    }
    arrays = {
        prefixes[name] + key: array for name, part in parts.items() for key, array in part.items()
    }
    arch = weights.config['model']['name']
    images = _stated_images(weights)
    weight_files.write(target, {'epoch': 0, 'arch': arch, 'state_dict': arrays}, images)


def write_flax(weights: Weights, parts: Parts, target: str) -> None:
    variables = part(weights, 'backbone')
    images = _stated_images(weights)
    if target.endswith('.msgpack'):
        weight_files.write(target, variables, images)
        return
    _check_new(pathlib.Path(target))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(pathlib.Path(target).absolute(), variables)
        sums = json.dumps(checkpoint_reader.describe(variables))
        (pathlib.Path(target) / weight_files.SUMS).write_text(sums)
        if images:
            weight_files.beside(target).write_text(json.dumps(images))
    except OSError as error:
        raise errors.UserError(f'{target} cannot be written: {error.strerror}') from error


def write_jax_export(weights: Weights, parts: Parts, target: str) -> None:
    """Writes a program that needs only JAX: uint8 images [B, S, S, C] -> features [B, D]."""
    config, variables = weights.config, part(weights, 'backbone')
    # The fused kernels are for training, and chosen by this machine's devices.
    module = backbones.from_config(config, kernels='plain', remat=False)
    mean, std = (tuple(config['augment'][key]) for key in ('mean', 'std'))

    def encode(images: jax.Array) -> Any:
        return module.apply(variables, jax_augment.normalize(images, mean, std))

    (batch,) = export.symbolic_shape('batch')
    size, channels = config['augment']['size'], config['data']['channels']
    images = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.uint8)
    exported = export.export(jax.jit(encode), platforms=('cpu', 'cuda', 'tpu'))(images)
    weight_files.write_bytes(target, bytes(exported.serialize()))


def write_workdir(weights: Weights, parts: Parts, target: str) -> None:
    _check_new(pathlib.Path(target) / checkpoint_reader.FOLDER)
    params, batch_stats = jax.tree.map(jnp.asarray, (weights.params, weights.batch_stats))
    step = jnp.zeros((), jnp.int32)
    state = TrainState(step, params, batch_stats, opt_state={}, target=None, method_state=None)
    with checkpoint.open(target, weights.config, max_to_keep=1) as checkpoints:
        checkpoints.save(state)
        if failure := checkpoints.failure(wait=True):
            raise errors.UserError(failure)


def _check_new(folder: pathlib.Path) -> None:
    if folder.exists():
        raise errors.UserError(f'{folder} exists; pass another --target')


STATE_DICT = (*weight_files.TORCH, '.safetensors')
FORMATS = {
    'torchvision': Format(write_state_dict, STATE_DICT, 'torchvision'),
    'timm': Format(write_timm, library='timm'),
    'detectron2': Format(write_detectron2, ('.pkl',), 'Detectron2'),
    'simsiam': Format(write_simsiam, weight_files.TORCH, "SimSiam's official code", heads=True),
    'state_dict': Format(write_state_dict, STATE_DICT),
    'huggingface': Format(write_huggingface),
    'flax': Format(write_flax, ours=True),
    'jax_export': Format(write_jax_export, ours=True),
    'workdir': Format(write_workdir, heads=True, ours=True),
}
