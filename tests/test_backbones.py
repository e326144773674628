"""Tests of models/backbones.py, network_contract.py, vit.py, convnext.py, pytorch_timm.py.

Trained by every method, loaded and evaluated; tests/figures/timm_networks.py has timm's features.
"""

import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_networks
import pytest
from commands import Commands
from configurations import TRAIN_ONLY, load
from figures import timm_networks
from flax import traverse_util
from scipy import stats

import simsiam_jax
from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors, migration
from simsiam_jax.checkpoints import checkpoint_reader, weights
from simsiam_jax.data import sources
from simsiam_jax.models import activations, backbones, convnext, pytorch_timm, vit
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.convert import conversion
from simsiam_jax.tools.doctor import estimates
from simsiam_jax.training import masks, optim, step
from simsiam_jax.training import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('_compiled_quickly')

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ROOT / 'tests' / 'figures' / 'timm_networks.npz'
DIGITS = sources.open_source('digits')
IMAGES, LABELS = DIGITS.images[:200], DIGITS.labels[:200]
SHORT: dict[str, Any] = {
    'config': 'quickstart:2ep',
    'batch_size': 64,
} | TRAIN_ONLY
SMALL_VIT = {'width': 16, 'depth': 1, 'heads': 2, 'patch_size': 2}
SMALL_CONVNEXT = {'widths': (8, 16), 'depths': (1, 1), 'patch_size': 1}


def _long_if_large() -> list[Any]:
    """Returns timm's networks, marked as long if another size of the same network is tested."""
    tested = ('vit_tiny', 'vit_tiny_avg', 'convnext_atto', 'convnext_tiny')
    return [
        pytest.param(name, marks=[] if name in tested else pytest.mark.long)
        for name in timm_networks.NETWORKS
    ]


def configure(name: str, arguments: dict | None = None, file: str = 'quickstart', **keys: Any):
    config = load(file, **keys)
    config.model.name = name
    config_keys.set_argument(config, 'model.arguments', arguments or {})
    return config


def backbone(name: str, arguments: dict | None = None, size: int = 8, **changes: Any):
    config = configure(name, arguments, augment__size=size)
    return backbones.from_config(config.to_dict(), **changes)


@pytest.mark.parametrize('method', ['simsiam', 'simclr', 'moco_v2', 'byol', 'swav'])
@pytest.mark.parametrize('name', ['tiny', 'unsynchronized', 'without_bn', 'bridged'])
def test_every_method_steps_on_own_network(name: str, method: str) -> None:
    config = configure(f'own_networks:{name}', {'width': 4}, f'quickstart:{method}')
    parts = pretrain_setup.build(config)
    train_step = step.make_train_step(parts.method, parts.tx, parts.mesh)
    before = jax.eval_shape(parts.init)
    shape = (config.batch_size, 8, 8, 1)
    after, metrics = jax.eval_shape(train_step, before, [jax.ShapeDtypeStruct(shape, 'f4')] * 2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert {'loss', 'z_std'} <= set(metrics)


def trained(name: str, devices: int, **keys: Any):
    """Returns the state and the metrics after two steps of a network on N devices."""
    config = configure(f'own_networks:{name}', batch_size=32, model__name=f'own_networks:{name}')
    config.update_from_flattened_dict(keys)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    parts = pretrain_setup.build(config, mesh)
    state = mesh_lib.replicate(parts.init(), mesh)
    train_step = pretrain_setup.build_step(config, parts)
    for batch in parts.batches(0, 2):
        state, metrics = train_step(state, batch)
    return parts, jax.device_get(state), jax.device_get(metrics)


def test_bn_is_synchronized_if_axis_name_is_taken() -> None:
    results = {(n, d): trained(n, d)[1:] for n in ('bridged', 'unsynchronized') for d in (1, 4)}
    losses = {key: float(metrics['loss']) for key, (_, metrics) in results.items()}
    assert losses['bridged', 1] == pytest.approx(losses['bridged', 4], abs=1e-5)
    assert losses['unsynchronized', 1] != pytest.approx(losses['unsynchronized', 4], abs=1e-4)


def test_frozen_modules_keep_their_weights() -> None:
    parts, state, _ = trained('without_bn', 1, **{'optim.weight_decay': 0.1})
    before, after = parts.init().params['backbone'], state.params['backbone']
    np.testing.assert_array_equal(
        before['frozen_patches']['kernel'], after['frozen_patches']['kernel']
    )
    assert np.any(before['Dense_0']['kernel'] != after['Dense_0']['kernel'])


def test_vit_with_frozen_patch_embedding_names_it_frozen() -> None:
    module = backbone('vit_tiny', SMALL_VIT | {'frozen_patch_embedding': True})
    params = backbones.init(module, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
    assert 'frozen_patch_embed' in params
    assert 'patch_embed' not in params


def test_run_with_import_path_resumes_loads_and_evaluates(
    tmp_path: pathlib.Path, command: Commands
) -> None:
    keys = SHORT | {'model.name': 'own_networks:tiny', 'model.arguments.width': 4}
    keys |= {'eval.split': 0.3, 'guard': 'warn', 'checkpoint.every_epochs': 1}
    run = simsiam_jax.pretrain(tmp_path / 'run', IMAGES, labels=LABELS, **keys)
    stored = checkpoint_reader.load(run.workdir, 'encoder').run.config['model']
    assert (stored['name'], stored['arguments']) == ('own_networks:tiny', {'width': 4})
    encoder = simsiam_jax.Encoder.load(run.workdir)
    assert encoder.features == 4
    assert encoder(IMAGES[:3]).shape == (3, 4)
    np.testing.assert_array_equal(
        encoder.to_nnx()(encoder.normalize(IMAGES[:3, ..., :])).shape[1], 4
    )
    assert np.isfinite(encoder.variables['batch_stats']['BatchNorm_0']['var']).all()
    # The first checkpoint again: the second epoch resumes from it, bit for bit.
    whole = checkpoint_reader.load(run.workdir, 'state').tree
    last = max((tmp_path / 'run' / 'checkpoints').iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(last)
    simsiam_jax.pretrain(tmp_path / 'run', IMAGES, labels=LABELS, **keys)
    resumed = checkpoint_reader.load(run.workdir, 'state').tree
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))
    for name in ('knn', 'linear:cached'):
        done = command(
            'simsiam_jax.main',
            f'--config=configs/{name.replace(":", ".py:")}' + ('' if ':' in name else '.py'),
            f'--workdir={tmp_path / name}',
            f'--config.init_from={run.workdir}',
            '--config.eval.train=digits/train',
            '--config.eval.test=digits/test',
            '--config.eval.split=0.0' if name == 'knn' else '--config.epochs=2',
        )
        assert done.returncode == 0, done.stderr


def test_evaluations_train_a_network_without_bn(tmp_path: pathlib.Path, command: Commands) -> None:
    keys = SHORT | {'config': 'quickstart:1ep', 'model.name': 'vit_tiny'}
    run = simsiam_jax.pretrain(tmp_path / 'run', IMAGES, **keys, **{'model.arguments': SMALL_VIT})
    assert jax.tree.leaves(simsiam_jax.load_encoder(run.workdir)[1]['batch_stats']) == []
    for file, optimizer in (('finetune', 'adamw'), ('linear', 'lars')):
        done = command(
            'simsiam_jax.main',
            f'--config=configs/{file}.py',
            f'--workdir={tmp_path / file}',
            f'--config.init_from={run.workdir}',
            '--config.eval.train=digits/train',
            '--config.eval.test=digits/test',
            f'--config.optim.name={optimizer}',
            *(['--config.optim.arguments.b2=0.99'] if optimizer == 'adamw' else []),
            '--config.batch_size=512',
            '--config.epochs=1',
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / file / 'result.json').exists()


def test_network_given_as_object_must_be_given_again(tmp_path: pathlib.Path) -> None:
    network = own_networks.Tiny(width=4)
    run = simsiam_jax.pretrain(tmp_path, IMAGES, backbone=network, **SHORT)
    assert run.encoder.features == 4
    config = checkpoint_reader.load(tmp_path, 'encoder').run.config
    assert config['model']['name'] == 'object:Tiny'
    message = r'the network is Tiny, .*not stored.*backbone='
    for call in (simsiam_jax.Encoder.load, simsiam_jax.load_encoder):
        with pytest.raises(errors.UserError, match=message):
            call(tmp_path)
    with pytest.raises(errors.UserError, match=r'\(given: WithoutBN\)'):
        simsiam_jax.Encoder.load(tmp_path, backbone=own_networks.WithoutBN())
    module, variables = simsiam_jax.load_encoder(tmp_path, backbone=network)
    features = module.apply(variables, run.encoder.normalize(IMAGES[:2, ..., :]))
    assert features.shape == (2, 4)
    resumed = simsiam_jax.pretrain(tmp_path, IMAGES, backbone=network, **SHORT)
    assert resumed.finished
    run.encoder.save(tmp_path / 'encoder.jax', 'jax_export')
    with pytest.raises(errors.UserError, match='backbone is the class NNXNet; expected a Flax'):
        simsiam_jax.pretrain(tmp_path / 'x', IMAGES, backbone=own_networks.NNXNet, **SHORT)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('no_such_module:net', {}, r"'no_such_module' cannot be imported .*PYTHONPATH"),
        ('own_networks:tinny', {}, r"own_networks has no function 'tinny'; did you mean tiny\?"),
        ('own_networks:tiny', {'widht': 4}, r'unknown key model\.arguments\.widht; .*width'),
        ('own_networks:tiny', {'width': -1}, r"'own_networks:tiny'.*train=True failed"),
        ('own_networks:maps', {}, r'returns \[2, 8, 8, 4\].*expected features \[B, D\]\. Pool'),
        ('own_networks:without_train', {}, r'takes images; expected __call__\(images, train\)'),
        ('own_networks:other_variables', {}, r'has variables counts; expected params'),
        ('own_networks:fails', {}, r'\[2, 8, 8, 1\] and train=True failed: TypeError'),
        ('own_networks:not_linen', {}, r'is the class NNXNet; .*nnx\.bridge\.to_linen'),
        ('vit_tinny', {}, r"model\.name is 'vit_tinny'; did you mean vit_tiny\?.*import path"),
        ('vit_tiny', {'patch': 4}, r'unknown key model\.arguments\.patch; .*patch_size'),
        ('vit_tiny', {'patch_size': 3}, r'patch_size is 3; expected a divisor of augment.size, 8'),
        ('vit_tiny', {'patch_size': 4, 'pool': 'max'}, r"pool is 'max'; "),
        ('convnext_atto', {}, r'augment\.size is 8, too small for patches of 4 and 4 stages'),
        ('convnext_tiny', {'depths': (1,)}, r'depths has 1 stages and widths 4'),
        ('resnet18', {'depth': 3}, r"model\.arguments is \{'depth': 3\}, but resnet18 takes none"),
    ],
)
def test_wrong_network_gives_one_line(name: str, arguments: dict, message: str) -> None:
    config = configure(name, arguments)
    with pytest.raises(errors.UserError, match=message) as caught:
        pretrain_setup.build_method(config)
    assert '\n' not in str(caught.value)


def test_network_without_remat_is_refused_with_it() -> None:
    config = configure('own_networks:tiny', model__remat=True)
    with pytest.raises(
        errors.UserError, match=r'model\.remat is True, but own_networks:tiny has no'
    ):
        pretrain_setup.build_method(config)


def test_merged_views_are_refused_with_an_unknown_momentum_of_bn() -> None:
    config = configure('own_networks:tiny', merge_views=True)
    with pytest.raises(errors.UserError, match=r'own_networks:tiny may have a momentum of BN'):
        pretrain_setup.build_method(config)


def test_keys_of_resnets_are_reported_as_unused(capsys) -> None:
    pretrain_setup.build(configure('own_networks:tiny'))
    assert (
        'warning: model.stem, model.width_multiplier, model.stages: only for ResNets, not for '
        'own_networks:tiny' in capsys.readouterr().out
    )


@pytest.mark.parametrize('name', _long_if_large())
def test_features_and_parameters_equal_those_of_timm(name: str) -> None:
    with np.load(FIGURES) as file:
        features, count = file[f'{name}/features'], int(file[f'{name}/parameters'])
    arguments = {'pool': 'avg'} if name.endswith('_avg') else {}
    model = {'name': name.removesuffix('_avg'), 'arguments': arguments}
    shapes = pytorch_timm.abstract_params(model, 3, 224)
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in shapes.items()}
    named = pytorch_timm.to_torch({'params': traverse_util.unflatten_dict(zeros)}, model['name'])
    arrays = {key: timm_networks.weights(key, x.shape) for key, x in named.items()}
    size = 224 if name.startswith('vit') else None
    assert pytorch_timm.identify(arrays, name) == (model, 3, size)
    variables = pytorch_timm.from_torch(arrays, name, model, 3, 224)
    assert sum(x.size for x in jax.tree.leaves(variables)) == count
    back = pytorch_timm.to_torch(variables, model['name'])
    assert all(np.array_equal(back[key], x) for key, x in arrays.items())
    module = backbone(model['name'], arguments, size=224, dtype='float32')
    ours = jax.jit(module.apply)(variables, timm_networks.images())
    np.testing.assert_allclose(ours, features, atol=1e-4)


def test_remat_and_local_crops_do_not_change_a_vit() -> None:
    plain, remat = (backbone('vit_tiny', SMALL_VIT, remat=r) for r in (False, True))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = backbones.init(plain, jax.random.key(0), images)
    np.testing.assert_allclose(plain.apply(variables, images), remat.apply(variables, images))
    assert plain.apply(variables, images[:, :4, :6]).shape == (2, 16)  # other numbers of patches
    with pytest.raises(errors.UserError, match='images of 3x8 do not divide into patches of 2'):
        plain.apply(variables, images[:, :3])


def test_depthwise_convolution_on_cpu_equals_that_of_xla() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (7, 7, 1, 3))
    padding = ((3, 3), (3, 3))
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=3,
    )
    np.testing.assert_allclose(convnext._depthwise(x, kernel, (1, 1), padding), expected, atol=1e-5)


@pytest.fixture(
    scope='module',
    params=[('vit_tiny', SMALL_VIT), ('convnext_tiny', SMALL_CONVNEXT)],
    ids=['vit_tiny', 'convnext_tiny'],
)
def run_of_built_in(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any]]:
    """A run of a built-in network, and the keys that differ from the default."""
    name, arguments = request.param
    keys = SHORT | {'config': 'quickstart:1ep', 'model.name': name, 'batch_size': 128}
    keys['model.arguments'] = arguments
    return simsiam_jax.pretrain(tmp_path_factory.mktemp(name), IMAGES, **keys), keys


@pytest.mark.parametrize('format_', ['state_dict', 'timm', 'huggingface', 'flax'])
def test_network_is_converted_and_loaded_again(
    tmp_path: pathlib.Path, run_of_built_in: tuple, format_: str
) -> None:
    run, keys = run_of_built_in
    name = keys['model.name']
    ending = {'state_dict': '.safetensors', 'flax': '.msgpack'}.get(format_, '')
    target = str(tmp_path / f'net{ending}')
    if (name, format_) == ('convnext_tiny', 'timm'):
        with pytest.raises(errors.UserError, match=r'timm has no ConvNeXt of 2 stages'):
            conversion.convert(run.workdir, target, format_)
        return
    assert name in conversion.convert(run.workdir, target, format_)
    encoder, loaded = run.encoder, simsiam_jax.Encoder.load(target)
    assert (loaded.size, loaded.mean) == (encoder.size, encoder.mean)
    np.testing.assert_allclose(loaded(IMAGES[:4]), encoder(IMAGES[:4]), atol=1e-5)
    if format_ == 'state_dict':  # the way from a file to a run is the same for all formats
        again = keys | {'init_from': target, 'dry_run': True}
        simsiam_jax.pretrain(tmp_path / 'again', IMAGES, **again)


def test_vit_is_selected_among_several(tmp_path: pathlib.Path) -> None:
    model = {'name': 'vit_tiny', 'arguments': {**SMALL_VIT, 'width': 64, 'heads': 1}}
    shapes = pytorch_timm.abstract_params(model, 3, 8)
    zeros = {path: np.zeros(x.shape, np.float32) for path, x in shapes.items()}
    named = pytorch_timm.to_torch({'params': traverse_util.unflatten_dict(zeros)})
    named['head.0.weight'] = np.zeros((2, 2), np.float32)
    several = {
        f'module.{part}.{key}': x
        for part in ('base_encoder', 'momentum_encoder')
        for key, x in named.items()
    }
    selected = pytorch_timm.select(several, 'moco.pth')
    assert selected is not None
    assert selected.prefix == 'module.base_encoder.'
    assert 'head.0.weight' not in selected.arrays
    assert pytorch_timm.identify(selected.arrays, 'moco.pth') == (model, 3, 8)
    several = {f'{part}.{key}': x for part in 'ab' for key, x in named.items()}
    with pytest.raises(errors.UserError, match=r'several networks in x\.pth: a, b.*x\.pth#b'):
        pytorch_timm.select(several, 'x.pth')
    assert pytorch_timm.select(several, 'x.pth', 'b').prefix == 'b.'
    del named['cls_token']
    with pytest.raises(errors.UserError, match='without class token'):
        pytorch_timm.identify(named, 'x.pth')


def test_own_network_has_no_format_of_pytorch(tmp_path: pathlib.Path) -> None:
    keys = SHORT | {'config': 'quickstart:1ep', 'model.name': 'own_networks:tiny'}
    run = simsiam_jax.pretrain(tmp_path / 'run', IMAGES, **keys)
    for format_ in ('state_dict', 'timm', 'torchvision', 'huggingface'):
        message = 'PyTorch has no network own_networks:tiny.*flax, jax_export, workdir'
        with pytest.raises(errors.UserError, match=message):
            conversion.convert(run.workdir, str(tmp_path / 'net.safetensors'), format_)
    for format_, file in (('flax', 'net.msgpack'), ('jax_export', 'net.jax'), ('workdir', 'run2')):
        conversion.convert(run.workdir, str(tmp_path / file), format_)
        assert (tmp_path / file).exists()
    assert simsiam_jax.Encoder.load(tmp_path / 'run2').features == 8
    with pytest.raises(errors.UserError, match='contains a network that is not built in'):
        weights.open_weights(tmp_path / 'net.msgpack')


def test_torchvision_has_no_vit(tmp_path: pathlib.Path) -> None:
    keys = SHORT | {'config': 'quickstart:1ep', 'model.name': 'vit_tiny'}
    run = simsiam_jax.pretrain(tmp_path / 'run', IMAGES, **keys, **{'model.arguments': SMALL_VIT})
    with pytest.raises(errors.UserError, match=r'torchvision has no vit_tiny; use --format=timm'):
        conversion.convert(run.workdir, str(tmp_path / 'net.safetensors'), 'torchvision')
    with pytest.raises(errors.UserError, match=r'feature_maps needs a ResNet; .* vit_tiny'):
        run.encoder.feature_maps(IMAGES[:2])


def test_weights_of_another_vit_name_the_keys(tmp_path: pathlib.Path) -> None:
    keys = SHORT | {'config': 'quickstart:1ep', 'model.name': 'vit_tiny'}
    run = simsiam_jax.pretrain(tmp_path / 'run', IMAGES, **keys, **{'model.arguments': SMALL_VIT})
    keys |= {'init_from': run.workdir, 'model.arguments': SMALL_VIT | {'width': 32}}
    with pytest.raises(
        errors.UserError, match=r"model\.name=vit_tiny, model\.arguments=\{.*'width'"
    ):
        simsiam_jax.pretrain(tmp_path / 'other', IMAGES, **keys)


@pytest.mark.parametrize('name', ['vit_tiny', 'own_networks:tiny'])
def test_doctor_estimates_any_network(name: str) -> None:
    config = configure(name, SMALL_VIT if name == 'vit_tiny' else {'width': 4})
    assert estimates.step_memory(config) > 0
    assert estimates.step_rate(config, pretrain_setup.build(config)) > 0


def test_operations_of_a_vit_are_those_of_its_products() -> None:
    module = backbone('vit_tiny', {'width': 192, 'depth': 2, 'heads': 2, 'patch_size': 2})
    n, d = 17, 192
    block = n * (3 * d * d + d * d + 8 * d * d) + 2 * n * n * d
    expected = 2 * (16 * 4 * d + 2 * block)
    assert estimates._forward_operations(module, 8, 1) == pytest.approx(expected, rel=0.1)


PARAMS = {
    'kernel': jnp.ones((2, 2)),
    'bias': jnp.ones((2, 2)),  # of attention
    'scale': jnp.ones(2),
    'cls_token': jnp.ones((1, 1, 2)),
    'pos_embed': jnp.ones((1, 3, 2)),
}


def test_only_kernels_decay() -> None:
    expected = {'kernel': True} | dict.fromkeys(('bias', 'scale', 'cls_token', 'pos_embed'), False)
    assert masks.decayed({'a': PARAMS}) == {'a': expected}


@pytest.mark.parametrize('schedule', ['constant', 'decayed', 'fixed'])
@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('adamw', {'b2': 0.95}),
        ('optax:lion', {}),
        ('optax:lamb', {'eps': 1e-8}),
        ('optax:adam', {}),
    ],
)
def test_optimizer_decays_kernels_alone(name: str, arguments: dict, schedule: str) -> None:
    tx, rates = optim.make(
        batch_size=256,
        epochs=1,
        steps_per_epoch=2,
        name=name,
        arguments=arguments,
        learning_rate=0.1,
        weight_decay=0.5,
        predictor_schedule=schedule,
    )
    params = {'backbone': PARAMS, 'predictor': PARAMS}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = {key for key, x in updates['backbone'].items() if np.any(x != 0)}
    assert moved == ({'kernel'} if name != 'optax:adam' else set())
    moved = {key for key, x in updates['predictor'].items() if np.any(x != 0)}
    assert moved == ({'kernel'} if name != 'optax:adam' and schedule != 'fixed' else set())
    assert ('lr_predictor' in rates) == (schedule != 'decayed')


def test_adamw_equals_that_of_optax_and_may_decay_all() -> None:
    values = {'batch_size': 256, 'epochs': 1, 'steps_per_epoch': 1, 'predictor_schedule': 'decayed'}
    tx, _ = optim.make(name='adamw', momentum=0.8, arguments={'decay_all': True}, **values)
    theirs = optax.adamw(0.05, b1=0.8, weight_decay=1e-4)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    for a, b in zip(
        *(jax.tree.leaves(t.update(grads, t.init(PARAMS), PARAMS)[0]) for t in (tx, theirs)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('optax:lionn', {}, "optax has no function 'lionn'; did you mean lion"),
        ('optax:lion', {'b3': 1}, r'unknown key optim\.arguments\.b3; '),
        ('optax:clip', {}, 'takes no learning_rate; expected an optimizer'),
        (
            'sgd',
            {'nesterov': True},
            r"optim\.arguments is \{'nesterov': True\}, but sgd takes none",
        ),
    ],
)
def test_wrong_optimizer_gives_one_line(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        optim.make(batch_size=8, epochs=1, steps_per_epoch=1, name=name, arguments=arguments)


def test_high_rate_of_adamw_is_reported(capsys) -> None:
    pretrain_setup.build(configure('own_networks:tiny', optim__name='adamw'))
    assert 'warning: optim.learning_rate is 0.8, high for adamw' in capsys.readouterr().out


def test_command_line_sets_arguments(tmp_path: pathlib.Path, command: Commands) -> None:
    flags = {
        'model.name': 'own_networks:tiny',
        'model.arguments.width': 6,
        'optim.name': 'optax:lion',
        'optim.arguments.b1': 0.8,
        'optim.learning_rate': 1e-4,
        'epochs': 1,
        'dry_run': True,
    }
    done = command(
        'simsiam_jax.main',
        '--config=configs/quickstart.py',
        f'--workdir={tmp_path}',
        *(f'--config.{key}={value}' for key, value in flags.items()),
    )
    assert done.returncode == 0, done.stderr
    assert 'simsiam on own_networks:tiny' in done.stdout
    done = command(
        'simsiam_jax.main',
        '--config=configs/quickstart.py',
        f'--workdir={tmp_path}',
        '--config.model.name=own_networks:tiny',
        '--config.model.arguments.wide=6',
    )
    assert done.returncode == 1
    assert done.stderr.strip() == ('error: unknown key model.arguments.wide; did you mean width?')


def test_stored_configuration_without_arguments_is_completed() -> None:
    stored = config_lib.default().to_dict()
    del stored['model']['arguments'], stored['optim']['arguments']
    complete = migration.complete(stored)
    assert complete['model']['arguments'] == complete['optim']['arguments'] == {}


def test_example_of_the_guide_runs(tmp_path: pathlib.Path, monkeypatch) -> None:
    guide = (ROOT / 'docs' / 'guides' / 'backbones.md').read_text()
    network, program = re.findall(r'```python\n(.*?)```', guide, re.DOTALL)[:2]
    (tmp_path / 'my_networks.py').write_text(network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(program, {'images': IMAGES, 'labels': LABELS} | {'SHORT': SHORT})
    assert (tmp_path / 'runs' / 'mine' / 'checkpoints').exists()


def test_gelu_and_its_gradient_are_exact() -> None:
    x = jnp.linspace(-6, 6, 97)
    values, vjp = jax.vjp(activations.gelu, x)
    np.testing.assert_allclose(values, x * stats.norm.cdf(x), atol=1e-6)
    slopes = stats.norm.cdf(x) + x * stats.norm.pdf(x)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0], slopes, atol=1e-6)


def test_sizes_are_those_of_timm() -> None:
    assert set(vit.NETWORKS) | set(convnext.NETWORKS) == {
        name.removesuffix('_avg') for name in timm_networks.NETWORKS
    }
