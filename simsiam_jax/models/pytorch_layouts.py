"""Finds the ResNet in state dicts of other projects, by the names and shapes of its arrays.

Names are those of nested mappings, joined by dots: `state_dict.module.encoder_q.conv1.weight`. A
prefix belongs to a ResNet if `conv1.weight` and `layer1.0.conv1.weight` follow it, or the same
arrays under the numbers of an nn.Sequential: `0.weight` and `4.0.conv1.weight`.
"""

import dataclasses
import re

import numpy as np

from simsiam_jax import errors
from simsiam_jax.models import pytorch, resnet

# Networks that a project stores together: the one to load, and the one to leave out.
_PREFERRED = (
    ('encoder_q', 'encoder_k'),  # MoCo v1 and v2
    ('base_encoder', 'momentum_encoder'),  # MoCo v3
    ('online_encoder', 'target_encoder'),  # BYOL
    ('online_network', 'target_network'),
    ('online_network_state_dict', 'target_network_state_dict'),
    ('online_net', 'target_net'),
    ('teacher', 'student'),  # DINO
    ('teacher_backbone', 'student_backbone'),  # lightly
    ('backbone', 'student_backbone'),
    ('backbone', 'backbone_momentum'),
    ('backbone', 'momentum_backbone'),  # solo-learn
    ('encoder', 'momentum_encoder'),
    ('backbone', 'target_net.0'),  # mmselfsup, mmpretrain
    ('backbone', 'encoder_k.0'),
    ('state_dict', 'ema_state_dict'),  # mmengine stores the averaged weights in state_dict
    ('base_model.model', 'loss.moco_encoder'),  # VISSL
    ('base_model.model', 'loss.momentum_encoder'),
    ('state_dict_ema', 'state_dict'),  # timm
    ('model_ema', 'model'),  # averages of weights
    ('ema_model', 'model'),
    ('ema', 'model'),
)
# DistributedDataParallel's and torch.compile's; of two networks, one may have them.
_WRAPPERS = ('module', '_orig_mod')
# Heads that may follow the prefix of a backbone.
_HEADS = re.compile(
    r'(fc|linear|head|classifier|projector|projection|projection_head|predictor|prototypes|queue'
    r'|queue_ptr|\d+)(\.|$)'
)
_BACKBONE = re.compile(r'(conv1|bn1|layer\d+)\.')


@dataclasses.dataclass(frozen=True)
class Selection:
    """The network of a file.

    Attributes:
      parts: 'backbone' and, for SimSiam's official files, 'projector' and 'predictor' -> arrays
        under torchvision's names.
      prefix: Prefix of the backbone in the file; '' or ends with a dot.
      left_out: Names of the other arrays, up to the first word that the prefix does not have.
    """

    parts: dict[str, pytorch.Arrays]
    prefix: str
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Returns which network was loaded, and what was left out; '' if the file is a backbone."""
        return pytorch.describe(self.prefix, self.left_out)

    def beside(self, name: str) -> bool:
        """Returns whether the file has an array or a module of this name beside the backbone."""
        parent, _, _ = self.prefix.rstrip('.').rpartition('.')
        return (f'{parent}.{name}' if parent else name) in self.left_out


def select(arrays: pytorch.Arrays, origin: str, wanted: str | None = None) -> Selection:
    """Selects the ResNet of a file.

    Args:
      arrays: Arrays of a file by name.
      origin: Name of the file, for messages.
      wanted: Prefix of the ResNet, or dotted names that only its prefix has; None selects the
        network that its project evaluates.

    Raises:
      UserError: There is no ResNet, or several and no rule prefers one.
    """
    networks = _find(arrays)
    if not networks:
        raise errors.UserError(
            f'no ResNet in {origin}: found {errors.first(arrays) or "nothing"}; expected '
            'conv1.weight and layer1.0.conv1.weight, or 0.weight and 4.0.conv1.weight, after any '
            f'prefix. Use a file with one of {", ".join(resnet.RESNETS)}'
        )
    prefix = _choose(arrays, networks, origin, wanted)
    others = tuple(other for other in networks if len(other) > len(prefix))
    parts: dict[str, pytorch.Arrays] = {'backbone': {}}
    used = set()
    for name, short in networks[prefix].items():
        # Unknown arrays stay, and pytorch.backbone_from_torch refuses them.
        if _BACKBONE.match(short) or not (_HEADS.match(short) or name.startswith(others)):
            parts['backbone'][short] = arrays[name]
            used.add(name)
    for part, start in _simsiam_heads(arrays, prefix).items():
        names = [name for name in arrays if name.startswith(start)]
        parts[part] = {name.removeprefix(start): arrays[name] for name in names}
        used |= set(names)
    left_out = dict.fromkeys(_start(name, prefix) for name in arrays if name not in used)
    return Selection(parts, prefix, tuple(left_out))


def _find(arrays: pytorch.Arrays) -> dict[str, dict[str, str]]:
    """Returns the ResNets: prefix -> {name in the file: torchvision's name}."""
    networks: dict[str, dict[str, str]] = {}
    for stem, array in arrays.items():
        match = re.fullmatch(r'(|.*\.)(conv1|\d+)\.weight', stem)
        if match is None or array.ndim != 4:
            continue
        prefix = match[1]
        names = {name: name.removeprefix(prefix) for name in arrays if name.startswith(prefix)}
        if match[2] != 'conv1':
            names = _unnumbered(names, int(match[2]))
        names = {
            name: re.sub(r'^(layer\d+\.\d+)\.shortcut\.', r'\1.downsample.', short)
            for name, short in names.items()
        }
        if {'conv1.weight', 'layer1.0.conv1.weight'} <= set(names.values()):
            networks[prefix] = names
    return networks


def _unnumbered(names: dict[str, str], stem: int) -> dict[str, str]:
    """Returns torchvision's names for the children of an nn.Sequential; {} if it is no ResNet.

    The numbers depend on the children without arrays, such as ReLU and max-pool.
    """
    given = set(names.values())
    words = {name.partition('.')[0] for name in given}
    numbers = sorted(int(word) for word in words if word.isdigit())
    layers = [i for i in numbers if f'{i}.0.conv1.weight' in given]
    if numbers[0] != stem or numbers[2 : 2 + len(layers)] != layers:
        return {}
    children = {numbers[0]: 'conv1', numbers[1]: 'bn1'}
    children |= {number: f'layer{i}' for i, number in enumerate(layers, 1)}
    renamed = {}
    for name, short in names.items():
        number, _, rest = short.partition('.')
        known = number.isdigit() and int(number) in children
        renamed[name] = f'{children[int(number)]}.{rest}' if known else short
    return renamed


def _choose(
    arrays: pytorch.Arrays, networks: dict[str, dict[str, str]], origin: str, wanted: str | None
) -> str:
    """Returns the prefix of the network to load."""
    prefixes = sorted(networks)
    if wanted is not None:
        wanted = wanted.rstrip('.')
        exact = [prefix for prefix in prefixes if prefix.rstrip('.') == wanted]
        prefixes = exact or [prefix for prefix in prefixes if f'.{wanted}.' in f'.{prefix}']
        if not prefixes:
            raise errors.UserError(
                f'no ResNet under {wanted!r} in {origin}; expected one of: {_listed(networks)}. '
                f'Write the path as {origin}#PREFIX'
            )
    prefixes = prefer(prefixes)
    # Modules with two names are stored twice.
    first, *others = prefixes
    contents = {short: arrays[name] for name, short in networks[first].items()}
    different = [
        other
        for other in others
        if not _same(contents, {short: arrays[name] for name, short in networks[other].items()})
    ]
    if different:
        raise errors.UserError(
            f'several ResNets in {origin}: {_listed([first, *different])}; expected one, or the '
            f'names of a known project. Choose one by its prefix, such as '
            f'{origin}#{different[0].rstrip(".")}'
        )
    return first


def prefer(prefixes: list[str]) -> list[str]:
    """Returns the prefixes without the networks that _PREFERRED leaves out."""
    plain = {
        prefix: '.' + '.'.join(word for word in prefix.split('.') if word not in _WRAPPERS)
        for prefix in prefixes
    }

    def better(prefix: str) -> set[str]:
        path = plain[prefix]
        return {path.replace(f'.{other}.', f'.{best}.') for best, other in _PREFERRED} - {path}

    return [prefix for prefix in prefixes if not better(prefix) & set(plain.values())]


def _same(first: pytorch.Arrays, second: pytorch.Arrays) -> bool:
    """Returns whether two networks have equal backbones."""
    names = {name for name in (*first, *second) if _BACKBONE.match(name)}
    return all(
        name in first
        and name in second
        and np.array_equal(first[name], second[name], equal_nan=True)
        for name in names
    )


def _listed(prefixes: dict[str, dict[str, str]] | list[str]) -> str:
    return errors.first((prefix.rstrip('.') or "''" for prefix in prefixes), 6)


def _simsiam_heads(arrays: pytorch.Arrays, prefix: str) -> dict[str, str]:
    """Returns the prefixes of SimSiam's heads by part; {} unless it is the official layout."""
    if prefix.split('.')[-2:-1] != ['encoder']:
        return {}
    starts = {
        'projector': f'{prefix}fc.',
        'predictor': f'{prefix.removesuffix("encoder.")}predictor.',
    }
    return starts if all(f'{start}0.weight' in arrays for start in starts.values()) else {}


def _start(name: str, prefix: str) -> str:
    """Returns the name up to the first word that the prefix does not have."""
    words, known = name.split('.'), prefix.split('.')[:-1]
    shared = 0
    while shared < len(known) and words[shared] == known[shared]:
        shared += 1
    return '.'.join(words[: shared + 1])
