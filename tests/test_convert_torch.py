"""Tests of tools/convert/ and checkpoints/weights.py against PyTorch, torchvision and timm."""

import os
import pathlib
import pickle
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.checkpoints import encoder, weights
from simsiam_jax.models import pytorch
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.convert import conversion, formats
from simsiam_jax.training import optim, step

torch = pytest.importorskip('torch', reason='torch is not installed')

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def torchvision():
    """Returns torchvision.

    PyPI's torchvision lacks its operators beside a PyTorch without CUDA; then NMS is defined here.
    """
    if 'torchvision' not in sys.modules:
        try:
            return pytest.importorskip('torchvision')
        except RuntimeError as error:
            assert 'operator torchvision::nms does not exist' in str(error)  # noqa: PT017
        for name in [name for name in sys.modules if name.startswith('torchvision')]:
            del sys.modules[name]
        library = torch.library.Library('torchvision', 'DEF')
        for name in ('nms', 'qnms'):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        library.impl('nms', nms, 'CPU')
        import torchvision

        torchvision.kept = library
        torchvision.ops.boxes._assert_has_ops = lambda: None
        roi_align = sys.modules['torchvision.ops.roi_align']
        roi_align._roi_align = roi_align._roi_align.__wrapped__  # the function without its compiler
    return sys.modules['torchvision']


def nms(boxes, scores, threshold):
    """Returns the indices of boxes [N, 4] that overlap no better box by more than the threshold."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        overlap = box_iou(boxes[order[:1]], boxes[order])[0]
        overlap[0] = 1
        order = order[overlap <= threshold]
    return torch.stack(kept) if kept else order


def randomize(net):
    """Weights and statistics that training could have left, features of unit scale."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            tensors = [(module.running_mean, 0), (module.running_var, 1)]
            if module.affine:
                tensors += [(module.weight.data, 0.7), (module.bias.data, 0)]
            for tensor, center in tensors:
                noise = torch.randn(tensor.shape, generator=generator) / 8 + center
                tensor.copy_(noise.abs() if center else noise)
    return net.eval()


def features(net, images=IMAGES):
    with torch.inference_mode():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


def equal(path, expected, images=IMAGES):
    module, variables = simsiam_jax.load_encoder(path)
    ours = np.asarray(module.apply(variables, images))
    scale = np.sqrt(np.mean(np.square(expected)))
    assert 0.05 < scale < 20
    np.testing.assert_allclose(ours / scale, expected / scale, rtol=0, atol=1e-4)


def loaded(net, arrays):
    net.load_state_dict(arrays, strict=True)
    return net.eval()


@pytest.fixture(scope='module')
def resnet18(torchvision, tmp_path_factory):
    """Returns a file with torchvision's network and classifier, the network, and its features."""
    net = randomize(torchvision.models.resnet18())
    path = tmp_path_factory.mktemp('torchvision') / 'resnet18.pth'
    torch.save(net.state_dict(), path)
    net.fc = torch.nn.Identity()
    return path, net, features(net)


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'])
def test_state_dict_of_torchvision_round_trips(name, torchvision, tmp_path):
    with torch.device('meta'):
        shapes = getattr(torchvision.models, name)(num_classes=2).state_dict()
    rng = np.random.default_rng(0)
    given = {
        key: torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32))
        if x.is_floating_point()
        else torch.zeros((), dtype=torch.int64)
        for key, x in shapes.items()
    }
    path, target = tmp_path / 'net.pth', tmp_path / 'again.pth'
    torch.save(given, path)
    opened = weights.open_weights(path)
    assert opened.config['model']['name'] == name
    formats.write_state_dict(opened, formats.to_torch(opened), str(target))
    again = torch.load(target, weights_only=True)
    assert set(given) - set(again) == {'fc.weight', 'fc.bias'}
    assert all(
        torch.equal(x, given[key]) and x.dtype == given[key].dtype for key, x in again.items()
    )


def test_features_equal_torchvision(resnet18, torchvision, tmp_path):
    path, _, expected = resnet18
    equal(path, expected)
    for target in ('again.pth', 'again.pth.tar', 'again.safetensors'):
        text = conversion.convert(str(path), str(tmp_path / target), 'torchvision')
        assert float(re.search(r'PyTorch: (\S+) of', text)[1]) < 1e-4
        equal(tmp_path / target, expected)
    again = torchvision.models.resnet18()
    again.fc = torch.nn.Identity()
    loaded(again, torch.load(tmp_path / 'again.pth', weights_only=True))
    np.testing.assert_array_equal(features(again), expected)


def test_features_equal_timm(resnet18, torchvision, tmp_path):
    timm = pytest.importorskip('timm')
    path, _, expected = resnet18
    conversion.convert(str(path), str(tmp_path / 'net'), 'timm')
    net = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    np.testing.assert_allclose(features(net), expected, rtol=0, atol=1e-6)
    assert net.default_cfg['crop_pct'] == 224 / 256
    classifier = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True, num_classes=3)
    assert classifier.fc.weight.shape == (3, 512)
    torch.save(timm.create_model('resnet18', num_classes=7).state_dict(), tmp_path / 'timm.pth')
    assert encoder.open_encoder(tmp_path / 'timm.pth').config['model']['name'] == 'resnet18'


def test_cifar_stem_loads_as_message_says(torchvision, tmp_path):
    net = torchvision.models.resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = torch.nn.Identity()
    randomize(net)
    torch.save(net.state_dict(), tmp_path / 'cifar.pth')
    net.fc = torch.nn.Identity()
    expected = features(net, IMAGES[:, :32, :32])
    with pytest.raises(errors.UserError, match='--format=state_dict') as caught:
        conversion.convert(str(tmp_path / 'cifar.pth'), str(tmp_path / 'x.pth'), 'torchvision')
    conversion.convert(str(tmp_path / 'cifar.pth'), str(tmp_path / 'x.pth'), 'state_dict')
    scope = {'torch': torch, 'torchvision': torchvision}
    exec(str(caught.value).partition('loads into: ')[2], scope)
    scope['net'].fc = torch.nn.Identity()
    again = loaded(scope['net'], torch.load(tmp_path / 'x.pth', weights_only=True))
    np.testing.assert_array_equal(features(again, IMAGES[:, :32, :32]), expected)


class Official(torch.nn.Module):
    """SimSiam with the names of the official code; the last layer of the projector has a bias."""

    def __init__(self, torchvision, dim=512, predictor_hidden_dim=16):
        super().__init__()
        nn = torch.nn
        self.encoder = torchvision.models.resnet18(num_classes=dim)
        width = self.encoder.fc.in_features
        hidden = [
            layer
            for _ in range(2)
            for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        ]
        self.encoder.fc = nn.Sequential(*hidden, self.encoder.fc, nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_hidden_dim, bias=False),
            nn.BatchNorm1d(predictor_hidden_dim),
            nn.ReLU(),
            nn.Linear(predictor_hidden_dim, dim),
        )

    def forward(self, x):
        z = self.encoder(x)
        return z, self.predictor(z)


def official_file(net, path, arch='resnet18'):
    state = {f'module.{key}': x for key, x in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.save(
        {'epoch': 100, 'arch': arch, 'state_dict': state, 'optimizer': optimizer.state_dict()}, path
    )
    return str(path)


@pytest.mark.parametrize('dim', [512, 64])
def test_official_checkpoint_converts_with_heads(dim, torchvision, tmp_path):
    net = randomize(Official(torchvision, dim))
    assert net.encoder.fc[6].bias.abs().max() > 0.01
    source = official_file(net, tmp_path / 'checkpoint_0099.pth.tar')
    with torch.inference_mode():
        z, p = net(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)))

    conversion.convert(source, str(tmp_path / 'run'), 'workdir')
    conversion.convert(str(tmp_path / 'run'), str(tmp_path / 'again.pth.tar'), 'simsiam')
    for path in (source, tmp_path / 'run'):
        ours = conversion.jax_outputs(weights.open_weights(path), IMAGES)
        np.testing.assert_allclose(ours['z'], z.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours['p'], p.numpy(), rtol=0, atol=1e-4)
    config = ConfigDict(encoder.open_encoder(tmp_path / 'run').config)
    tx, _ = optim.make(batch_size=8, epochs=1, steps_per_epoch=1)
    state = step.init_state(pretrain_setup.build_method(config), tx, 0, (64, 64, 3))
    _, text = weights.load_into_state(state, weights.open_weights(tmp_path / 'run'))
    assert text == f'loaded backbone, predictor, projector from {tmp_path / "run"}'

    saved = torch.load(tmp_path / 'again.pth.tar', weights_only=True)
    assert saved['arch'] == 'resnet18'
    state = {key.removeprefix('module.'): x for key, x in saved['state_dict'].items()}
    again = loaded(Official(torchvision, dim), state)
    with torch.inference_mode():
        z_again, _ = again(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(z_again.numpy(), z.numpy(), rtol=0, atol=1e-5)


def test_simsiam_format_loads_in_official_linear_evaluation(resnet18, torchvision, tmp_path):
    """The official code loads module.encoder without fc, and expects only fc to be missing."""
    path, _, expected = resnet18
    conversion.convert(str(path), str(tmp_path / 'x.pth.tar'), 'simsiam')
    state = torch.load(tmp_path / 'x.pth.tar', weights_only=True)['state_dict']
    kept = {
        key.removeprefix('module.encoder.'): x
        for key, x in state.items()
        if key.startswith('module.encoder') and not key.startswith('module.encoder.fc')
    }
    net = torchvision.models.resnet18()
    assert set(net.load_state_dict(kept, strict=False).missing_keys) == {'fc.weight', 'fc.bias'}
    net.fc = torch.nn.Identity()
    np.testing.assert_array_equal(features(net.eval()), expected)


SMALL_TIMM = {
    'vit_tiny_patch16_224': {
        'img_size': 32,
        'patch_size': 8,
        'embed_dim': 64,
        'depth': 2,
        'num_heads': 1,
        'global_pool': 'avg',
    },
    'convnext_atto': {},
    'convnext_tiny': {'depths': (1, 2, 1, 1), 'dims': (4, 8, 8, 16)},
}


@pytest.mark.usefixtures('torchvision')
@pytest.mark.parametrize('name', SMALL_TIMM)
def test_vit_and_convnext_equal_timm_both_ways(name, tmp_path):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=7, **SMALL_TIMM[name]).eval()
    for x in net.parameters():
        x.data += torch.randn(x.shape) / 16  # no gamma of 1e-6
    torch.save({'state_dict': net.state_dict()}, tmp_path / 'timm.pth')
    images = torch.from_numpy(IMAGES[:, :32, :32].transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = net.forward_head(net.forward_features(images), pre_logits=True).numpy()
    module, variables = simsiam_jax.load_encoder(tmp_path / 'timm.pth')
    ours = module.apply(variables, IMAGES[:, :32, :32])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)

    report = conversion.convert(str(tmp_path / 'timm.pth'), str(tmp_path / 'net'), 'timm')
    assert float(re.search(r'difference .*: (\S+) of', report)[1]) < 1e-5
    again = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    with torch.inference_mode():
        np.testing.assert_allclose(again(images).numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        simsiam_jax.load_encoder(tmp_path / 'net')[0].apply(variables, IMAGES[:, :32, :32]), ours
    )
    conversion.convert(str(tmp_path / 'timm.pth'), str(tmp_path / 'x.pth'), 'state_dict')
    state = torch.load(tmp_path / 'x.pth', weights_only=True)
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {'head.weight', 'head.bias', 'head.fc.weight', 'head.fc.bias'}


def test_load_encoder_uses_query_encoder_of_moco(resnet18, tmp_path):
    _, net, expected = resnet18
    state = {f'module.encoder_q.{key}': x for key, x in net.state_dict().items()}
    state |= {f'module.encoder_k.{key}': x + 1 for key, x in net.state_dict().items()}
    state |= {
        'module.encoder_q.fc.0.weight': torch.ones(4, 512),
        'module.encoder_k.fc.0.weight': torch.ones(4, 512),
        'module.queue': torch.ones(4, 8),
        'module.queue_ptr': torch.zeros(1, dtype=torch.int64),
    }
    moco = tmp_path / 'moco.pth.tar'
    torch.save({'epoch': 200, 'arch': 'resnet18', 'state_dict': state}, moco)
    equal(moco, expected)


def test_load_encoder_refuses_contradicting_architecture(torchvision, tmp_path):
    path = official_file(Official(torchvision), tmp_path / 'x.pth.tar', arch='resnet50')
    with pytest.raises(errors.UserError, match=r'states that it is a resnet50.*of a resnet18'):
        simsiam_jax.load_encoder(path)


def test_convert_writes_nothing_if_outputs_differ(resnet18, tmp_path, monkeypatch):
    state = torch.load(resnet18[0], weights_only=True)
    state['layer3.1.bn2.bias'][3] = torch.nan
    torch.save(state, tmp_path / 'nan.pth')
    with pytest.raises(errors.UserError, match=r'differ by nan.*nothing was written'):
        conversion.convert(str(tmp_path / 'nan.pth'), str(tmp_path / 'x.pth'), 'torchvision')
    assert not (tmp_path / 'x.pth').exists()

    right = pytorch.backbone_from_torch

    def wrong(arrays, origin):
        variables = right(arrays, origin)
        kernel = variables['params']['layer4_1']['conv2']['kernel']
        variables['params']['layer4_1']['conv2']['kernel'] = kernel[::-1]
        return variables

    monkeypatch.setattr(pytorch, 'backbone_from_torch', wrong)
    with pytest.raises(errors.UserError, match='nothing was written'):
        conversion.convert(str(resnet18[0]), str(tmp_path / 'x.pth'), 'torchvision')


class Attack:
    """Creates the folder `path` when plain pickle opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_load_encoder_refuses_pickles_that_run_code(tmp_path):
    attack = {'state_dict': {'conv1.weight': Attack(str(tmp_path / 'pwned'))}}
    torch.save(attack, tmp_path / 'zip.pth')
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps(attack))
    (tmp_path / 'old.pth').write_bytes(pickle.dumps(attack, protocol=2))
    for name in ('zip', 'plain', 'old'):
        with pytest.raises(errors.UserError, match='contains more than weights') as caught:
            simsiam_jax.load_encoder(tmp_path / f'{name}.pth')
        assert '\n' not in str(caught.value)
        assert 'torch.save(model.state_dict()' in str(caught.value)
    with pytest.raises(errors.UserError, match=r'tries to run \w+\.mkdir'):
        simsiam_jax.load_encoder(tmp_path / 'zip.pth')
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('legacy', [False, True])
def test_load_encoder_runs_no_code_beside_weights(legacy, resnet18, tmp_path):
    path, _, expected = resnet18
    attack = {'model': torch.load(path, weights_only=True), 'x': Attack(str(tmp_path / 'pwned'))}
    torch.save(attack, tmp_path / 'x.ckpt', _use_new_zipfile_serialization=not legacy)
    equal(tmp_path / 'x.ckpt', expected)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('size', [0, 100, 10_000, -50])
def test_load_encoder_refuses_truncated_files(size, resnet18, tmp_path):
    data = resnet18[0].read_bytes()
    (tmp_path / 'x.pth').write_bytes(data[:size])
    with pytest.raises(errors.UserError, match='damaged') as caught:
        simsiam_jax.load_encoder(tmp_path / 'x.pth')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [torch.ones(3), [1, 2], {'epoch': 3}])
def test_load_encoder_refuses_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(errors.UserError, match='expected'):
        simsiam_jax.load_encoder(tmp_path / 'x.pth')


def test_load_encoder_widens_half_precision(resnet18, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    state = torch.load(resnet18[0], weights_only=True)
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in state.items()}
    torch.save(half, tmp_path / 'x.pth')
    safetensors.save_file(half, tmp_path / 'x.safetensors')
    for path in ('x.pth', 'x.safetensors'):
        _, variables = simsiam_jax.load_encoder(tmp_path / path)
        np.testing.assert_array_equal(
            variables['batch_stats']['bn1']['mean'], half['bn1.running_mean'].float().numpy()
        )


def test_commands_and_code_of_guide_run(torchvision, tmp_path, monkeypatch):
    """Runs every command and block of the guide, in a folder that contains runs/imagenet."""
    pytest.importorskip('timm')
    monkeypatch.chdir(tmp_path)
    net = randomize(torchvision.models.resnet50())
    torch.save(net.state_dict(), 'resnet50.pth')
    net.fc = torch.nn.Identity()
    expected = features(net)
    conversion.convert('resnet50.pth', 'runs/imagenet', 'workdir')

    guide = (ROOT / 'docs/guides/pytorch.md').read_text()
    commands = re.findall(r'^    python -m simsiam_jax\.tools\.convert (.*)$', guide, re.MULTILINE)
    done = set()
    for command in commands:
        given = dict(flag.removeprefix('--').split('=', 1) for flag in shlex.split(command))
        if given['source'] == 'runs/cifar10':
            continue  # tested above with a CIFAR stem
        conversion.convert(given['source'], given['target'], given['format'])
        done.add(given['format'])
    pytorch = {'torchvision', 'timm', 'detectron2', 'simsiam'}
    assert done == pytorch | {'flax', 'huggingface', 'jax_export', 'workdir'}
    scope = {}
    for block in re.findall(r'```python\n(.*?)```', guide, re.DOTALL):
        exec(block, scope)
    for name in ('backbone', 'timm_backbone'):
        np.testing.assert_allclose(features(scope[name].eval()), expected, rtol=0, atol=1e-5)
    equal('r50.msgpack', expected)

    # One training step of the detector on a synthetic image.
    detector = scope['detector'].train()
    image = torch.rand(3, 96, 128)
    target = {'boxes': torch.tensor([[10.0, 10, 60, 70]]), 'labels': torch.tensor([1])}
    detector.transform.min_size, detector.transform.max_size = (96,), 128
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    before = detector.backbone.body.layer4[0].conv1.weight.clone()
    np.testing.assert_array_equal(before.detach(), net.layer4[0].conv1.weight.detach())
    loss = sum(detector([image], [target]).values())
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(detector.backbone.body.layer4[0].conv1.weight, before)


@pytest.mark.usefixtures('torchvision')
def test_detector_example_learns_from_converted_backbone(tmp_path, capsys, monkeypatch) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / 'trained.pth')
    script = ROOT / 'examples' / 'torch_detector.py'
    files = [str(tmp_path / name) for name in ('trained.pth', 'backbone.pth')]
    monkeypatch.setattr(sys, 'argv', [str(script), *files])
    runpy.run_path(str(script), run_name='__main__')
    shown = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r'^step \d+  loss ([\d.]+)$', shown, re.MULTILINE)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
