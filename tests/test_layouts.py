"""Tests of models/pytorch_layouts.py and checkpoints/weights.py on other projects' files.

PyTorch made the files' names and features (tests/figures/layouts.py).
"""

import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.checkpoints import weight_files, weights
from simsiam_jax.methods import simsiam
from simsiam_jax.models import pytorch_layouts, resnet
from simsiam_jax.tools.convert import __main__ as convert
from simsiam_jax.tools.convert import conversion
from simsiam_jax.training import optim, step

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = np.load(ROOT / 'tests/figures/layouts.npz')
NAMES = sorted({key.partition('/')[0] for key in FIGURES} - {'images'})
# Layout -> prefix of the network that is loaded, and the names of the rest.
EXPECTED = {
    'torchvision': 'left out: fc',
    'timm with EMA': 'state_dict_ema; left out: state_dict',
    'SwAV': 'state_dict.module; left out: state_dict.module.projection_head, '
    'state_dict.module.prototypes',
    'MoCo v1 and v2': 'state_dict.module.encoder_q; left out: state_dict.module.encoder_k, '
    'state_dict.module.encoder_q.fc, state_dict.module.queue, state_dict.module.queue_ptr',
    'MoCo v3': 'state_dict.module.base_encoder; left out: state_dict.module.base_encoder.fc, '
    'state_dict.module.momentum_encoder, state_dict.module.predictor',
    'BYOL, byol-pytorch': 'net; left out: online_encoder, online_predictor, target_encoder',
    'BYOL, PyTorch-BYOL': 'online_network_state_dict.encoder; left out: '
    'online_network_state_dict.projetion, target_network_state_dict',
    'SimCLR, backbone': 'state_dict.backbone; left out: state_dict.backbone.fc',
    'SimCLR, encoder': 'encoder; left out: projector',
    'SimCLR, f and g': 'f; left out: g',
    'SupContrast': 'model.encoder.module; left out: model.head',
    'lightly': 'state_dict.backbone; left out: state_dict.backbone_momentum, '
    'state_dict.criterion, state_dict.projection_head',
    'lightly, its own ResNet': 'state_dict.model.backbone',
    'lightly, DINO': 'state_dict.backbone; left out: state_dict.projection_head, '
    'state_dict.student_backbone',
    'solo-learn': 'state_dict.backbone; left out: state_dict.classifier, '
    'state_dict.momentum_backbone, state_dict.projector',
    'solo-learn, CIFAR': 'state_dict.backbone; left out: state_dict.classifier, '
    'state_dict.projector',
    'mmselfsup': 'state_dict.backbone; left out: state_dict.neck, state_dict.target_net',
    'mmselfsup, MoCo': 'state_dict.backbone; left out: state_dict.encoder_k, '
    'state_dict.encoder_q, state_dict.neck',
    'mmpretrain': 'state_dict.backbone; left out: ema_state_dict, state_dict.head',
    'VISSL': 'classy_state_dict.base_model.model.trunk._feature_blocks; left out: '
    'classy_state_dict.base_model.model.heads, classy_state_dict.loss',
    'DINO': 'teacher.module.backbone; left out: dino_loss, student, teacher.module.head',
    'Barlow Twins': 'model.module.backbone; left out: model.module.bn, model.module.projector',
    'Lightning with EMA': 'state_dict.ema.module; left out: state_dict.model',
}


def arrays_of(layout, separator='.'):
    """Returns the arrays of a layout by name; the separator is between nested keys."""
    shapes = json.loads(str(FIGURES[f'{layout}/shapes']))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    values = np.split(FIGURES[f'{layout}/values'].astype(np.float32), ends[:-1])
    return {
        name.replace('/', separator): value.reshape(shape)
        for (name, shape), value in zip(shapes.items(), values, strict=True)
    }


def without_optimizer(arrays):
    return {name: array for name, array in arrays.items() if 'optimizer' not in name}


def nested(layout):
    """Returns the mappings that the project stores."""
    tree = {'epoch': 3}
    for name, array in arrays_of(layout, '/').items():
        *keys, last = name.split('/')
        inner = tree
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = array
    return tree


def save(path, arrays):
    path.write_bytes(safetensors.numpy.save(arrays))
    return str(path)


def assert_features(path, layout):
    images = FIGURES['images'].astype(np.float32)
    if layout == 'solo-learn, CIFAR':
        images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    module, variables = simsiam_jax.load_encoder(path)
    expected = FIGURES[f'{layout}/features']
    assert np.mean(np.ptp(expected, axis=0) > 0) >= 0.5  # most channels are alive
    scale = np.sqrt(np.mean(np.square(expected)))
    ours = np.asarray(module.apply(variables, images))
    np.testing.assert_allclose(ours / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize('layout', NAMES)
def test_load_encoder_opens_layout_with_features_of_pytorch(layout, tmp_path, capsys):
    errors.warn_once.cache_clear()
    path = save(tmp_path / 'x.safetensors', without_optimizer(arrays_of(layout)))
    assert_features(path, layout)
    printed = capsys.readouterr().err
    assert f'loaded the backbone of {path} ({EXPECTED[layout]})\n' in printed
    assert ('pads the images of a 3x3 stem by 2' in printed) == (layout == 'solo-learn, CIFAR')


@pytest.mark.parametrize('layout', NAMES)
def test_names_of_nested_state_dicts_are_joined_by_dots(layout):
    """Optimizers are skipped, and so are entries that are not arrays."""
    flat = dict(weight_files._named(nested(layout)))
    expected = without_optimizer(arrays_of(layout))
    assert flat.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(flat[name], array)


def test_prefix_selects_network(tmp_path):
    path = save(tmp_path / 'x.safetensors', arrays_of('MoCo v1 and v2'))
    conv1 = {
        name: weights.from_file(f'{path}{suffix}').parts['backbone']['conv1.weight']
        for name, suffix in {
            'default': '',
            'q': '#encoder_q',
            'k': '#encoder_k',
            'whole': '#state_dict.module.encoder_k.',
        }.items()
    }
    np.testing.assert_array_equal(conv1['default'], conv1['q'])
    np.testing.assert_array_equal(conv1['k'], conv1['whole'])
    assert not np.array_equal(conv1['q'], conv1['k'])
    assert weights.is_file(f'{path}#encoder_k')
    assert not weights.is_file(tmp_path / 'run#1')
    with pytest.raises(errors.UserError, match=r"under 'encoder' in .*one of: .*encoder_k, .*q"):
        weights.from_file(f'{path}#encoder')


def test_several_networks_without_rule_are_refused(tmp_path):
    net = arrays_of('torchvision')
    path = save(tmp_path / 'x.safetensors', net | {f'a.{key}': x + 1 for key, x in net.items()})
    with pytest.raises(errors.UserError) as caught:
        simsiam_jax.load_encoder(path)
    assert str(caught.value) == (
        f"several ResNets in {path}: '', a; expected one, or the names of a known project. Choose "
        f'one by its prefix, such as {path}#a'
    )
    for prefix, change in (('', 0), ('a', 1)):
        parts = weights.from_file(f'{path}#{prefix}').parts
        np.testing.assert_array_equal(parts['backbone']['bn1.bias'], net['bn1.bias'] + change)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda a: {f'x.{key}': x for key, x in a.items() if 'layer1' not in key},
            r'no ResNet in .*: found x\.bn1\.bias, x\.bn1\.running_mean, .* and \d+ more; expected '
            r'conv1\.weight and layer1\.0\.conv1\.weight, or 0\.weight and 4\.0\.conv1\.weight',
        ),
        (lambda a: a | {'attnpool.weight': np.ones(2)}, 'unexpected: attnpool.weight'),
        (lambda a: a | {'layer1.0.se.fc1.weight': np.ones(2)}, r'unexpected: layer1\.0\.se'),
        (
            lambda a: {f'm.{key}': x for key, x in a.items() if key != 'layer2.0.bn1.bias'},
            r'missing: layer2\.0\.bn1\.bias',
        ),
    ],
)
def test_load_encoder_refuses_other_networks_under_prefix(change, message, tmp_path):
    path = save(tmp_path / 'x.safetensors', change(arrays_of('torchvision')))
    with pytest.raises(errors.UserError, match=message) as caught:
        simsiam_jax.load_encoder(path)
    assert '\n' not in str(caught.value)


def test_sequential_with_layer_before_stem_is_no_resnet():
    arrays = arrays_of('SimCLR, f and g')
    shifted = {
        re.sub(r'^f\.(\d+)', lambda m: f'f.{int(m[1]) + 1}', k): x for k, x in arrays.items()
    }
    assert pytorch_layouts.select(shifted, 'file').prefix == 'f.'
    shifted['f.0.weight'] = np.ones(3, np.float32)  # BN of the images
    with pytest.raises(errors.UserError, match='no ResNet in file'):
        pytorch_layouts.select(shifted, 'file')


def test_official_simsiam_file_keeps_heads():
    arrays = {f'module.encoder.{name}': x for name, x in arrays_of('SimCLR, encoder').items()}
    arrays = {name.replace('encoder.encoder', 'encoder'): x for name, x in arrays.items()}
    del arrays['module.encoder.projector.0.weight']
    heads = {'projector': 'module.encoder.fc.', 'predictor': 'module.predictor.'}
    for prefix in heads.values():
        arrays |= {f'{prefix}{name}': np.ones((2, 2)) for name in ('0.weight', '3.weight')}
    selection = pytorch_layouts.select(arrays, 'file')
    assert str(selection) == 'module.encoder'
    for part in heads:
        assert set(selection.parts[part]) == {'0.weight', '3.weight'}
    # A classifier and a predictor of another project are not SimSiam's heads.
    arrays['module.encoder.fc.weight'] = arrays.pop('module.encoder.fc.0.weight')
    assert set(pytorch_layouts.select(arrays, 'file').parts) == {'backbone'}


def test_run_and_conversion_start_from_layout(tmp_path):
    path = save(tmp_path / 'dino.safetensors', arrays_of('DINO'))
    backbone = resnet.make('resnet50', width_multiplier=2 / 64, stages=(1, 1))
    tx, _ = optim.make(batch_size=8, epochs=1, steps_per_epoch=1)
    state = step.init_state(simsiam.make(backbone, dim=4), tx, 0, (32, 32, 3))
    state, text = weights.load_into_state(state, weights.open_weights(path))
    assert text == (
        f'loaded backbone from {path} ({EXPECTED["DINO"]}); random initialization: predictor, '
        'projector'
    )
    kernel = arrays_of('DINO')['teacher.module.backbone.conv1.weight'].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(state.params['backbone']['conv1']['kernel'], kernel)

    target = str(tmp_path / 'r50.safetensors')
    text = conversion.convert(path, target, 'state_dict')
    assert f'contains backbone of {path} ({EXPECTED["DINO"]}): resnet50' in text
    assert_features(target, 'DINO')


@pytest.mark.parametrize(
    ('arch', 'accepted'),
    [
        ('', True),
        ('resnet', True),
        ('resnet18', True),
        ('timm/resnet18.a1_in1k', True),
        ('resnet50', False),
        ('resnetblur18', False),  # the same names and shapes
    ],
)
def test_stated_architecture_must_match(arch, accepted, tmp_path, monkeypatch):
    arrays = arrays_of('torchvision')
    monkeypatch.setattr(weight_files, 'read', lambda path: (arrays, arch))
    monkeypatch.setitem(resnet.RESNETS, 'resnet18', (resnet.BasicBlock, (1, 1)))
    path = tmp_path / 'x.pth'
    if accepted:
        assert weights.from_file(path).config['model']['name'] == 'resnet18'
    else:
        with pytest.raises(errors.UserError, match=f'states that it is a {arch}.*of a resnet18'):
            weights.from_file(path)


def test_documentation_names_every_project():
    guide = (ROOT / 'docs/guides/pytorch.md').read_text()
    projects = {name.partition(',')[0].removesuffix(' with EMA') for name in NAMES}
    for text in (guide, convert.__doc__):
        assert {name for name in projects if name not in text} == set()


class Arguments:
    """Stands for a class of a trainer, such as a Namespace of its arguments."""

    def __init__(self, **kwargs):
        self.values = kwargs


class Settings(dict):
    """A mapping with its own class, as in Lightning's hyper_parameters."""


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('layout', NAMES)
def test_load_encoder_opens_file_of_torch_save(layout, legacy, tmp_path):
    torch = pytest.importorskip('torch', reason='torch is not installed')
    tree = weight_files._tensors(torch, nested(layout)) | {
        'args': Arguments(lr=0.1, layers=[1, Arguments()]),
        'hyper_parameters': Settings(names={'a'}, scale=np.float64(3)),
        'log': np.ones(3),
        'function': pathlib.Path('x'),
    }
    path = tmp_path / 'x.ckpt'
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    assert_features(path, layout)
