"""Tests of models/resnet.py, heads.py and network.py: shapes, initialization and dtypes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from simsiam_jax import errors
from simsiam_jax.methods import simsiam
from simsiam_jax.models import heads, resnet


def flat_shapes(tree):
    return {'/'.join(path): x.shape for path, x in traverse_util.flatten_dict(tree).items()}


def init_shapes(module, *shape):
    """Returns the shapes of a module's parameters for an input of `shape`."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=True), x)
    return flat_shapes(variables['params'])


# torchvision's counts minus the classifier's 1000 (D + 1).
@pytest.mark.parametrize(
    ('name', 'count', 'features'),
    [
        ('resnet18', 11_176_512, 512),
        ('resnet34', 21_284_672, 512),
        ('resnet50', 23_508_032, 2048),
        ('resnet101', 42_500_160, 2048),
        ('resnet152', 58_143_808, 2048),
    ],
)
def test_resnet_parameter_counts_equal_torchvision(name, count, features):
    backbone = resnet.make(name)
    variables = resnet.abstract_variables(backbone, 3)
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == count
    assert backbone.features == features


@pytest.mark.parametrize('channels', [1, 5])
def test_resnet_accepts_any_number_of_input_channels(channels):
    backbone = resnet.make('resnet18', width_multiplier=1 / 16, stages=(1, 1))
    image = jnp.ones((2, 16, 16, channels))
    feature, variables = backbone.init_with_output(jax.random.key(0), image)
    assert variables['params']['conv1']['kernel'].shape == (7, 7, channels, 4)
    assert feature.shape == (2, backbone.features) == (2, 8)
    assert feature.dtype == jnp.float32


@pytest.mark.parametrize(
    ('stem', 'kernel', 'positions'), [('imagenet', (7, 7), (8, 4)), ('cifar', (3, 3), (32, 16))]
)
def test_resnet_stem_sets_resolution_of_stages(stem, kernel, positions):
    """The ImageNet stem quarters the resolution, the CIFAR stem keeps it."""
    backbone = resnet.make('resnet18', stem=stem, width_multiplier=1 / 16, stages=(1, 1))

    def apply(image):
        _, variables = backbone.init_with_output(
            jax.random.key(0), image, capture_intermediates=True, mutable=True
        )
        return variables

    variables = jax.eval_shape(apply, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert variables['params']['conv1']['kernel'].shape == (*kernel, 3, 4)
    for stage, size in enumerate(positions, 1):
        (block,) = variables['intermediates'][f'layer{stage}_0']['__call__']
        assert block.shape[1:3] == (size, size)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'resnet5'}, r"model\.name is 'resnet5'"),
        ({'stem': 'cifar10'}, r"model\.stem is 'cifar10'; did you mean cifar"),
        ({'dtype': 'float16'}, r"model\.dtype is 'float16'"),
        ({'kernels': 'fuse'}, r"model\.kernels is 'fuse'; did you mean fused"),
        ({'width_multiplier': 0.001}, r'model\.width_multiplier is 0\.001'),
    ],
)
def test_resnet_make_refuses_unknown_values_by_name(arguments, message):
    with pytest.raises(errors.UserError, match=message):
        resnet.make(**arguments)


def test_simsiam_heads_have_shapes_of_section_3():
    """The projector and predictor of section 3, on ResNet-50."""
    network = simsiam.make(resnet.make()).network
    assert init_shapes(network.projector, 2, 2048) == {
        'fc1/kernel': (2048, 2048),
        'bn1/scale': (2048,),
        'bn1/bias': (2048,),
        'fc2/kernel': (2048, 2048),
        'bn2/scale': (2048,),
        'bn2/bias': (2048,),
        'fc3/kernel': (2048, 2048),
    }
    assert init_shapes(network.predictor, 2, 2048) == {
        'fc1/kernel': (2048, 512),
        'bn1/scale': (512,),
        'bn1/bias': (512,),
        'fc2/kernel': (512, 2048),
        'fc2/bias': (2048,),
    }


def test_projector_output_bn_normalizes_z_without_relu():
    projector = simsiam.make(resnet.make(), dim=16).network.projector
    x = jax.random.normal(jax.random.key(0), (64, 8))
    z, _ = projector.init_with_output(jax.random.key(1), x, train=True)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-3)


def test_mlp_has_biases_only_without_bn_after_layer():
    plain = heads.MLP((8, 8, 4), hidden_bn=False, output_bn=True, output_affine=False)
    assert init_shapes(plain, 2, 6) == {
        'fc1/kernel': (6, 8),
        'fc1/bias': (8,),
        'fc2/kernel': (8, 8),
        'fc2/bias': (8,),
        'fc3/kernel': (8, 4),
    }
    full = heads.MLP((8, 4), output_bn=True)
    assert init_shapes(full, 2, 6) == {
        'fc1/kernel': (6, 8),
        'bn1/scale': (8,),
        'bn1/bias': (8,),
        'fc2/kernel': (8, 4),
        'bn2/scale': (4,),
        'bn2/bias': (4,),
    }


@pytest.fixture(scope='module')
def params():
    """Initial parameters of a full-width network with one block per stage."""
    backbone = resnet.make('resnet50', stages=(1, 1))
    network = simsiam.make(backbone, dim=512, predictor_hidden_dim=128).network
    init = jax.jit(lambda key: network.init(key, jnp.zeros((1, 32, 32, 3))))
    return traverse_util.flatten_dict(jax.device_get(init(jax.random.key(0))['params']))


def test_convolutions_start_normal_with_fan_out(params):
    """Normal, not truncated, of variance 2 / fan_out (He et al., 2015)."""
    kernels = {path: x for path, x in params.items() if x.ndim == 4}
    assert len(kernels) == 9
    for path, kernel in kernels.items():
        height, width, _, channels = kernel.shape
        z = kernel.ravel() * math.sqrt(height * width * channels / 2)
        # Five standard errors, of the deviation and of the 4.55% beyond two deviations.
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * z.size), path
        tail = np.mean(np.abs(z) > 2)
        assert abs(tail - 0.0455) < 5 * math.sqrt(0.0455 * 0.9545 / z.size), path


def test_heads_start_uniform_with_fan_in(params):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernels and biases."""
    weights = {path: x for path, x in params.items() if path[-2].startswith('fc')}
    assert len(weights) == 6
    for (*path, leaf), weight in weights.items():
        fan_in = params[*path, 'kernel'].shape[0]
        u = weight.ravel() * math.sqrt(fan_in)
        assert np.max(np.abs(u)) <= 1 + 1e-6, (path, leaf)
        # Five standard errors of a uniform's variance, 1/3 with 4/45 for its squares.
        assert abs(np.mean(u * u) - 1 / 3) < 5 * math.sqrt(4 / 45 / u.size), (path, leaf)


@pytest.mark.parametrize(('name', 'last'), [('resnet18', 'bn2'), ('resnet50', 'bn3')])
def test_bn_scale_starts_at_0_in_last_of_block_only(name, last):
    """Scale 0 in the last BN of every block, 1 in all others; bias 0."""
    backbone = resnet.make(name, width_multiplier=1 / 16, stages=(2, 1))
    image = jnp.zeros((1, 16, 16, 3))
    params = traverse_util.flatten_dict(backbone.init(jax.random.key(0), image)['params'])
    zero = []
    for path, x in params.items():
        if path[-1] == 'scale':
            residual = path[-2] == last and path[0].startswith('layer')
            zero.append(residual)
            np.testing.assert_array_equal(x, 0 if residual else 1, err_msg=str(path))
        elif path[-1] == 'bias':
            np.testing.assert_array_equal(x, 0, err_msg=str(path))
    assert sum(zero) == 3


def test_bfloat16_computes_but_keeps_float32_variables():
    """Computes in bfloat16; parameters, BN statistics and outputs are float32."""
    backbone = resnet.make('resnet18', width_multiplier=1 / 16, stages=(1, 1), dtype='bfloat16')
    network = simsiam.make(backbone, dim=16, predictor_hidden_dim=8).network

    def apply(image):
        return network.init_with_output(
            jax.random.key(0), image, capture_intermediates=True, mutable=True
        )

    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    outputs, variables = jax.eval_shape(apply, image)
    float32 = [outputs, variables['params'], variables['batch_stats']]
    assert {x.dtype for x in jax.tree.leaves(float32)} == {np.dtype('float32')}

    computed = traverse_util.flatten_dict(variables['intermediates'])
    # The network, the backbone and the heads return float32, as checked above.
    layers = {'/'.join(path[:-1]): xs for path, xs in computed.items() if len(path) > 2}
    assert layers.keys() >= {'backbone/conv1', 'backbone/layer2_0/bn1', 'projector/fc1'}
    assert {x.dtype for xs in layers.values() for x in xs} == {jnp.dtype('bfloat16')}
