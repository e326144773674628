"""Tests of tools/convert/, checkpoints/weights.py, models/pytorch.py, without PyTorch."""

import json
import pathlib
import pickle
import pickletools
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

import simsiam_jax
from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors
from simsiam_jax.checkpoints import encoder, weight_files, weights
from simsiam_jax.methods import simsiam
from simsiam_jax.models import pytorch, pytorch_heads, resnet
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.convert import conversion, formats
from simsiam_jax.training import optim, step

ROOT = pathlib.Path(__file__).parent.parent
# Number of arrays in torchvision's state dicts, without fc.weight and fc.bias.
ENTRIES = {'resnet18': 120, 'resnet34': 216, 'resnet50': 318, 'resnet101': 624, 'resnet152': 930}


SMALL = {'width_multiplier': 0.125, 'stages': (1, 2)}


def random_like(tree, seed=0):
    """Returns random float32 bits, with values that arithmetic would change, such as NaN and -0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32), tree)


def random_variables(name='resnet18', seed=0, channels=3, **kwargs):
    """Returns random weights that give features of unit scale."""
    rng = np.random.default_rng(seed)
    shapes = resnet.abstract_variables(resnet.make(name, **kwargs), channels)

    def draw(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if x.ndim > 1:
            return noise * np.float32(np.sqrt(2 / np.prod(x.shape[:-1])))
        return np.abs(noise / 8 + 1) if path[-1].key in ('var', 'scale') else noise / 8

    return jax.tree_util.tree_map_with_path(draw, shapes)


def same_bits(ours, theirs):
    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())

    jax.tree.map(check, ours, theirs)


def save(path, arrays):
    path.write_bytes(safetensors.numpy.save(arrays))
    return path


@pytest.fixture
def _no_torch(monkeypatch):
    monkeypatch.setattr(weight_files, 'load_torch', lambda: None)


@pytest.fixture(scope='module')
def small_file(tmp_path_factory):
    """Returns a file with a narrow ResNet of two stages, and its variables."""
    variables = random_variables(**SMALL)
    arrays = pytorch.backbone_to_torch(variables)
    return save(tmp_path_factory.mktemp('file') / 'small.safetensors', arrays), variables


@pytest.mark.parametrize('name', ENTRIES)
def test_backbone_round_trip_keeps_every_bit(name):
    variables = random_like(resnet.abstract_variables(resnet.make(name), 3))
    arrays = pytorch.backbone_to_torch(variables)
    assert len(arrays) == ENTRIES[name]
    same_bits(pytorch.backbone_from_torch(arrays, name), variables)

    floats = {key: x for key, x in arrays.items() if x.dtype == np.float32}
    others = arrays | random_like(floats, seed=1)
    same_bits(pytorch.backbone_to_torch(pytorch.backbone_from_torch(others, name)), others)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'channels'),
    [(name, {}, 3) for name in ENTRIES]
    + [
        ('resnet18', {'stem': 'cifar', 'width_multiplier': 0.5}, 1),
        ('resnet50', {'stages': (1, 2, 1)}, 5),
    ],
)
def test_identify_network_from_names_and_shapes(name, kwargs, channels):
    shapes = resnet.abstract_variables(resnet.make(name, **kwargs), channels)
    arrays = pytorch.backbone_to_torch(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    model, identified_channels = pytorch.identify(arrays, 'file')
    assert identified_channels == channels
    assert resnet.make(**model) == resnet.make(name, **kwargs)


@pytest.mark.parametrize('model', ['R50-C4', 'R50-FPN'])
def test_to_detectron2_names_every_array(model):
    """Detectron2 matches a name in a file to the one parameter that ends with it."""
    expected = json.loads((ROOT / 'tests/figures/detectron2.json').read_text())[model]
    arrays = pytorch.backbone_to_torch(random_variables('resnet50'))
    renamed = pytorch.to_detectron2(arrays)
    matches = {}
    for name in expected:
        (matches[name],) = [ours for ours in renamed if name.endswith(f'.{ours}')]
    assert sorted(matches.values()) == sorted(renamed)
    assert {name: list(renamed[ours].shape) for name, ours in matches.items()} == expected
    where = 'roi_heads' if model == 'R50-C4' else 'backbone.bottom_up'
    for theirs, ours in {
        f'{where}.res5.0.shortcut.norm.running_var': 'layer4.0.downsample.1.running_var',
        f'{where}.res5.2.conv3.weight': 'layer4.2.conv3.weight',
        f'{where}.res5.0.conv1.norm.bias': 'layer4.0.bn1.bias',
    }.items():
        np.testing.assert_array_equal(renamed[matches[theirs]], arrays[ours])


def heads(**kwargs):
    method = simsiam.make(resnet.make(width_multiplier=0.125, stages=(1,)), **kwargs)
    shapes = jax.eval_shape(
        method.network.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
    )
    tree = random_like(shapes)
    return [
        {key: tree[key].get(name, {}) for key in ('params', 'batch_stats')}
        for name in ('projector', 'predictor')
    ]


def test_heads_to_torch_use_official_names():
    projector, predictor = heads(dim=16, predictor_hidden_dim=4)
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    assert set(pytorch_heads.to_torch(projector, output_bias=True)) == (
        {'0.weight', '3.weight', '6.weight', '6.bias'}
        | {f'{i}.{leaf}' for i in (1, 4) for leaf in bn}
        | {f'7.{leaf}' for leaf in bn[2:]}
    )
    assert set(pytorch_heads.to_torch(predictor)) == (
        {'0.weight', '3.weight', '3.bias'} | {f'1.{leaf}' for leaf in bn}
    )


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        {'projector_layers': 2, 'projector_output_affine': True},
        {'projector_hidden_bn': False, 'projector_output_bn': False},
        {'predictor_hidden_bn': False, 'predictor_output_bn': True},
    ],
)
def test_heads_round_trip_keeps_every_bit(kwargs):
    for head in heads(dim=16, predictor_hidden_dim=4, **kwargs):
        arrays = pytorch_heads.to_torch(head)
        same_bits(pytorch_heads.from_torch(arrays, 'file'), head)
    mlps = [pytorch_heads.mlp_of(head) for head in heads(dim=16, predictor_hidden_dim=4, **kwargs)]
    arguments = pytorch_heads.simsiam_arguments(*mlps)
    assert simsiam.make(resnet.make(), **arguments).network == (
        simsiam.make(resnet.make(), dim=16, predictor_hidden_dim=4, **kwargs).network
    )


def test_heads_from_torch_refuse_other_layers():
    for name in ('weight', '0.running_mean', '0.weight_g'):
        with pytest.raises(errors.UserError, match=f'unknown layer .*: {name}.*fully connected'):
            pytorch_heads.from_torch({name: np.ones(3, np.float32)}, 'file')


def test_heads_from_torch_fold_bias_into_bn_mean():
    arrays = {
        '0.weight': np.ones((2, 3), np.float32),
        '0.bias': np.float32([1, 2]),
        '1.running_mean': np.float32([5, 5]),
        '1.running_var': np.ones(2, np.float32),
    }
    head = pytorch_heads.from_torch(arrays, 'file')
    np.testing.assert_array_equal(head['batch_stats']['bn1']['mean'], [4, 3])
    assert set(head['params']['fc1']) == {'kernel'}


@pytest.mark.usefixtures('_no_torch')
@pytest.mark.parametrize(
    ('format_', 'target'),
    [
        ('state_dict', 'x.safetensors'),
        ('flax', 'x.msgpack'),
        ('flax', 'item'),
        ('workdir', 'run'),
    ],
)
def test_convert_without_torch_writes_readable_formats(format_, target, small_file, tmp_path):
    source, variables = small_file
    text = conversion.convert(str(source), str(tmp_path / target), format_)
    # The source has PyTorch's names, and a network of PyTorch to compare with.
    assert 'torch is not installed: the networks were not compared' in text
    assert "(ImageNet's size, mean, std are assumed: " in text
    opened = encoder.open_encoder(tmp_path / target)
    same_bits(opened.variables, variables)
    assert opened.module == resnet.make('resnet18', **SMALL)
    assert opened.config['augment']['size'] == 224
    if format_ != 'workdir':  # what was assumed is not stated as if it were known
        assert weights.from_file(tmp_path / target).assumed == 'size, mean, std'
    assert tuple(opened.config['augment']['mean']) == (0.485, 0.456, 0.406)
    same_bits(weights.open_weights(tmp_path / target).params['backbone'], variables['params'])


@pytest.mark.usefixtures('_no_torch')
@pytest.mark.parametrize(
    ('format_', 'inside', 'message'),
    [
        ('flax', '', r'checksums\.json'),
        ('workdir', 'checkpoints/0/encoder', 'checksum of .* wrong'),
    ],
)
def test_load_encoder_verifies_checksums_of_folder(format_, inside, message, small_file, tmp_path):
    source, variables = small_file
    conversion.convert(str(source), str(tmp_path / 'made'), format_)
    item = tmp_path / 'made' / inside
    same_bits(simsiam_jax.load_encoder(item)[1], variables)
    largest = max(item.rglob('*'), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(x ^ 1 for x in data[middle : middle + 16])
    largest.write_bytes(data)
    with pytest.raises(errors.UserError, match=f'damaged.*{message}'):
        simsiam_jax.load_encoder(item)


@pytest.mark.usefixtures('_no_torch')
def test_convert_names_arrays_for_torchvision_timm_and_detectron2(tmp_path):
    variables = random_variables('resnet18')
    arrays = pytorch.backbone_to_torch(variables)
    source = str(save(tmp_path / 'r18.safetensors', arrays))
    conversion.convert(source, str(tmp_path / 'x.safetensors'), 'torchvision')
    conversion.convert(source, str(tmp_path / 'timm'), 'timm')
    conversion.convert(source, str(tmp_path / 'x.pkl'), 'detectron2')
    for path in ('x.safetensors', 'timm/model.safetensors'):
        same_bits(safetensors.numpy.load((tmp_path / path).read_bytes()), arrays)
    described = json.loads((tmp_path / 'timm' / 'config.json').read_text())
    assert described['architecture'] == 'resnet18'
    assert described['pretrained_cfg']['input_size'] == [3, 224, 224]
    same_bits(simsiam_jax.load_encoder(tmp_path / 'timm')[1], variables)
    described['pretrained_cfg'] |= {'mean': [0.1, 0.2, 0.3], 'input_size': [3, 96, 96]}
    (tmp_path / 'timm' / 'config.json').write_text(json.dumps(described))
    augment = encoder.open_encoder(tmp_path / 'timm').config['augment']
    assert (augment['mean'], augment['size']) == ((0.1, 0.2, 0.3), 96)
    (tmp_path / 'timm' / 'config.json').write_text('{')
    with pytest.raises(errors.UserError, match=r'config\.json is damaged'):
        encoder.open_encoder(tmp_path / 'timm')

    data = (tmp_path / 'x.pkl').read_bytes()
    content = pickle.loads(data)
    assert content['matching_heuristics'] is True
    same_bits(content['model'], pytorch.to_detectron2(arrays))
    assert content['model']['stem.conv1.weight'].flags.writeable
    # Users of Detectron2 may have NumPy 1, which lacks the modules of NumPy 2.
    strings = {arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)}
    assert 'numpy' in strings
    assert not {text for text in strings if text.startswith(('numpy.', 'numpy_'))}


def refused(arrays, change):
    arrays = dict(arrays)
    change(arrays)
    return arrays


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda a: a.pop('layer1.0.conv2.weight'), r'missing: layer1\.0\.conv2\.weight'),
        (lambda a: a.update(se=np.ones(1)), r'does not match resnet18: unexpected: se'),
        (
            lambda a: a.update({f'x{i}': np.ones(1) for i in range(9)}),
            'unexpected: x0, x1, x2 and 6 more',
        ),
        (lambda a: a.pop('conv1.weight'), r'no ResNet in .*; expected conv1\.weight'),
        (
            lambda a: a.update({'conv1.weight': np.ones((8, 3, 5, 5), np.float32)}),
            r'unknown network.*\[8, 3, 5, 5\].*; expected a conv1 of 7x7 or 3x3',
        ),
        (
            lambda a: a.update({'layer2.0.conv1.weight': np.ones((16, 4, 3, 3), np.float32)}),
            r'different shape: layer2\.0\.conv1\.weight.*Use one of resnet18',
        ),
    ],
)
def test_load_encoder_refuses_other_networks(change, message, small_file, tmp_path):
    arrays = pytorch.backbone_to_torch(small_file[1])
    path = save(tmp_path / 'x.safetensors', refused(arrays, change))
    with pytest.raises(errors.UserError, match=message) as caught:
        simsiam_jax.load_encoder(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('ending', 'data', 'message'),
    [
        ('.safetensors', lambda data: data[:-100], 'damaged.*safetensors.torch.save_file'),
        ('.safetensors', lambda data: b'', 'damaged'),
        ('.msgpack', lambda data: data[:-100], 'damaged.*flax.serialization.to_bytes'),
        ('.msgpack', lambda data: serialization.to_bytes({'a': np.ones(3)}), 'no params'),
        ('.pth', None, 'cannot be read: No such file'),
    ],
)
def test_load_encoder_refuses_damaged_files(ending, data, message, small_file, tmp_path):
    source, variables = small_file
    path = tmp_path / f'x{ending}'
    if data:
        whole = serialization.to_bytes(variables)
        path.write_bytes(data(source.read_bytes() if ending == '.safetensors' else whole))
    with pytest.raises(errors.UserError, match=message) as caught:
        simsiam_jax.load_encoder(path)
    assert '\n' not in str(caught.value)


@pytest.mark.usefixtures('_no_torch')
@pytest.mark.parametrize(
    ('kwargs', 'channels', 'format_', 'target', 'message'),
    [
        (
            {'stem': 'cifar'},
            3,
            'torchvision',
            'x.safetensors',
            r'cifar stem.*--format=state_dict.*models\.resnet18\(\); net\.conv1 = torch\.nn\.Conv2d'
            r'\(3, 64, 3, 1, 1, bias=False\); net\.maxpool = torch\.nn\.Identity',
        ),
        ({'stem': 'cifar'}, 3, 'detectron2', 'x.pkl', 'Detectron2 has no resnet18 with a cifar'),
        ({}, 1, 'timm', 'x', r'timm has no.*1 channels.*Conv2d\(1, 64, 7, 2, 3'),
        (
            {'width_multiplier': 2.0},
            3,
            'simsiam',
            'x.pth',
            r'no resnet18 of model\.width_multiplier=2',
        ),
        ({}, 3, 'torchvison', 'x.pth', r"'torchvison'; did you mean torchvision\?"),
        ({}, 3, 'torchvision', 'x.npz', r'invalid --target: .*x\.npz; expected a name in \.pth'),
        ({}, 3, 'torchvision', 'x.pth', 'needs torch, which is not installed.*safetensors'),
        ({}, 3, 'flax', '', 'exists; pass another --target'),
        ({}, 3, 'flax', 'file/x.msgpack', 'cannot be written'),
        ({}, 3, 'flax', 'file/x', 'cannot be written'),
        ({}, 3, 'workdir', 'file/x', 'cannot be written'),
    ],
)
def test_convert_refuses_weights_that_format_lacks(
    kwargs, channels, format_, target, message, tmp_path
):
    (tmp_path / 'file').write_text('in the way')
    arrays = pytorch.backbone_to_torch(random_variables(channels=channels, **kwargs))
    source = str(save(tmp_path / 'source.safetensors', arrays))
    with pytest.raises(errors.UserError, match=message) as caught:
        conversion.convert(source, str(tmp_path / target), format_)
    assert '\n' not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'source.safetensors'}


def test_difference_is_relative_to_outputs_whose_squares_overflow(small_file, monkeypatch):
    given = weights.from_file(small_file[0])
    outputs = {'feature': np.full((2, 16), 1e30, np.float32)}
    monkeypatch.setattr(weight_files, 'load_torch', lambda: np)
    monkeypatch.setattr(conversion, 'jax_outputs', lambda *_: outputs)
    theirs = {'feature': np.full((2, 16), 1.5e30, np.float32)}
    monkeypatch.setattr(conversion.torch_forward, 'outputs', lambda *_: theirs)
    assert abs(conversion.difference(given, [{}]) - 1 / 3) < 1e-6


def test_convert_command_prints_one_line_errors(command, tmp_path):
    tool = 'simsiam_jax.tools.convert'
    result = command(tool, '--source=/no/such.safetensors', f'--target={tmp_path}', '--format=flax')
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('error: /no/such.safetensors cannot be read')
    result = command(tool, '--source=x')
    assert result.returncode == 1
    assert '--target must have a value' in result.stderr.splitlines()[-1]


@pytest.mark.long
def test_run_starts_from_weights_of_another_run(command, tmp_path):
    """kNN before training equals kNN after training of the source or of its conversion."""

    def train(workdir, *flags):
        result = command(
            'simsiam_jax.main',
            '--config=configs/quickstart.py',
            f'--workdir={workdir}',
            '--config.epochs=1',
            '--config.model.width_multiplier=0.125',
            '--config.model.stages=(1,)',
            '--config.log.tensorboard=False',
            '--config.log.report=False',
            *flags,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout, dict(re.findall(r'^  (\S.*?)  +([\d.]+)', result.stdout, re.M))

    _, source = train(tmp_path / 'source')
    text, top1 = train(tmp_path / 'second', f'--config.init_from={tmp_path / "source"}')
    assert f'backbone, predictor, projector from {tmp_path / "source"}\n' in text
    assert top1['before training'] == source['after training']
    assert top1['after training'] != source['after training']

    target = tmp_path / 'converted'
    conversion.convert(str(tmp_path / 'source'), str(target), 'workdir')
    same_bits(simsiam_jax.load_encoder(target)[1], simsiam_jax.load_encoder(tmp_path / 'source')[1])
    # A converted workdir was not trained here, so its configuration may change.
    text, top1 = train(target, '--config.batch_size=64')
    assert f'backbone, predictor, projector from {target}\n' in text
    assert top1['before training'] == source['after training']
    text, _ = train(target, '--config.batch_size=64')
    assert f'resuming from step 22 in {target}' in text


def initial_state(**kwargs):
    backbone = resnet.make('resnet18', **SMALL, **kwargs)
    tx, _ = optim.make(batch_size=8, epochs=1, steps_per_epoch=1)
    method = simsiam.make(backbone, dim=16, predictor_hidden_dim=4)
    return step.init_state(method, tx, 0, (32, 32, 3))


def test_load_into_state_loads_only_what_fits(small_file):
    given = weights.open_weights(small_file[0])
    before = initial_state()
    after, text = weights.load_into_state(before, given)
    assert text == (
        f'loaded backbone from {small_file[0]}; random initialization: predictor, projector'
    )
    same_bits(after.params['backbone'], small_file[1]['params'])
    same_bits(after.batch_stats['backbone'], small_file[1]['batch_stats'])
    same_bits(after.params['projector'], before.params['projector'])
    with pytest.raises(errors.UserError, match=r'does not fit.*stem=imagenet.*stages=\(1, 2\)'):
        weights.load_into_state(initial_state(stem='cifar'), given)


def test_load_into_state_also_sets_momentum_target(small_file):
    before = initial_state()
    before = before.replace(target={'params': before.params, 'batch_stats': before.batch_stats})
    after, _ = weights.load_into_state(before, weights.open_weights(small_file[0]))
    same_bits(after.target['params']['backbone'], small_file[1]['params'])
    same_bits(after.target['batch_stats']['backbone'], small_file[1]['batch_stats'])


IMAGES = {'size': 36, 'resize': 40, 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}


@pytest.mark.usefixtures('_no_torch')
def test_images_travel_through_every_format_and_back(small_file, tmp_path, capsys):
    given = weights.from_file(small_file[0])
    given.config['augment'].update({key: IMAGES[key] for key in ('size', 'mean', 'std')})
    given.config['eval']['resize'] = IMAGES['resize']
    formats.write_workdir(given, {}, str(tmp_path / 'run'))
    source, chain = 'run', ('v.msgpack', 'w.safetensors', 'item', 'x.safetensors', 'again')
    for target in chain:
        format_ = {'again': 'workdir'}.get(target, 'flax')
        format_ = 'state_dict' if target.endswith('.safetensors') else format_
        text = conversion.convert(str(tmp_path / source), str(tmp_path / target), format_)
        assert 'assumed' not in text
        # From our own run to our own format there is nothing to compare.
        assert ('not compared' in text) == (source != 'run')
        config = encoder.open_encoder(tmp_path / target).config
        stated = {key: config['augment'][key] for key in ('size', 'mean', 'std')}
        stated['resize'] = config['eval']['resize']
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()} == IMAGES
        source = target
    assert not capsys.readouterr().err
    encoder.open_encoder(small_file[0])
    assert "does not state size, mean, std of its images; assumed ImageNet's: size 224" in (
        capsys.readouterr().err
    )


def test_timm_folder_states_resize(small_file, tmp_path):
    whole = weights.from_file(small_file[0])
    whole.config['augment']['size'], whole.config['eval']['resize'] = 36, 40
    formats.write_timm(whole, formats.to_torch(whole), str(tmp_path / 'timm'))
    config = encoder.open_encoder(tmp_path / 'timm').config
    assert (config['augment']['size'], config['eval']['resize']) == (36, 40)


@pytest.mark.parametrize('text', ['[1', '{"mean": 3}'])
def test_load_encoder_refuses_damaged_description_of_images(text, small_file, tmp_path):
    conversion.convert(str(small_file[0]), str(tmp_path / 'x.msgpack'), 'flax')
    (tmp_path / 'x.msgpack.json').write_text(text)
    with pytest.raises(errors.UserError, match=r'x\.msgpack\.json does not describe images'):
        encoder.open_encoder(tmp_path / 'x.msgpack')


def test_open_encoder_of_file_has_complete_configuration(small_file):
    config = encoder.open_encoder(small_file[0]).config
    assert set(config) == set(config_lib.default())
    given = config_lib.ConfigDict(config)
    config_keys.check(given)
    backbone = pretrain_setup.build_method(given).network.backbone
    assert (backbone.width, backbone.stages, backbone.dtype) == (8, (1, 2), np.float32)
