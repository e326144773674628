"""Tests of models/kernels.py: fused kernels give the same values as plain kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from simsiam_jax.models import kernels, resnet
from simsiam_jax.training import mesh as mesh_lib

DATA = mesh_lib.DATA


def rounded(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns values of few levels, so that many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize('size', [(8, 8), (7, 9)])
@pytest.mark.parametrize('x', [rounded, lambda *shape: np.full(shape, -1.0, np.float32)])
def test_fused_max_pool_equals_plain_bit_for_bit(size: tuple[int, int], x) -> None:
    """Covers its gradient with equal values, at borders, and where four windows overlap."""
    x = jnp.asarray(x(2, *size, 3))
    results = []
    for fused in (False, True):
        pooled, pull = jax.vjp(lambda x, fused=fused: kernels.max_pool(x, fused=fused), x)
        g = np.random.default_rng(1).standard_normal(pooled.shape).astype(np.float32)
        results.append((pooled, *pull(jnp.asarray(g))))
    for plain, fused in zip(*results, strict=True):
        np.testing.assert_array_equal(fused, plain)
    assert np.count_nonzero(results[1][1]) > 0


def test_fused_max_pool_keeps_nan_like_plain() -> None:
    x = rounded(1, 6, 6, 1)
    x[0, 2, 2, 0] = np.nan
    pooled, plain = (kernels.max_pool(jnp.asarray(x), fused=fused) for fused in (True, False))
    np.testing.assert_array_equal(pooled, plain)
    assert np.isnan(pooled).sum() == 1


@pytest.mark.parametrize(
    'shape', [(32, 32, 3), (33, 31, 3), (16, 17, 1), (18, 18, 5), (7, 8, 4)], ids=str
)
def test_stem_of_blocks_equals_plain_convolution(shape: tuple[int, int, int]) -> None:
    """Covers odd sizes, other numbers of channels, and the gradients of both arguments."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((7, 7, shape[2], 8)), jnp.float32)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ('NHWC', 'HWIO', 'NHWC'))
    results = []
    for convolve in (jax.lax.conv_general_dilated, kernels.space_to_depth_conv):

        def run(x, kernel, convolve=convolve):
            return convolve(x, kernel, (2, 2), [(3, 3), (3, 3)], dimension_numbers=numbers)

        y, pull = jax.vjp(run, x, kernel)
        g = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
        results.append((y, *pull(jnp.asarray(g))))
    for plain, blocks in zip(*results, strict=True):
        assert jnp.abs(plain - blocks).max() < 1e-5 * jnp.abs(plain).max()


def features(kind: str, devices: int, **kwargs):
    """Returns output, gradients and statistics of a stem and blocks with both kinds of shortcut."""
    backbone = resnet.make(
        'resnet50',
        stages=(2,),
        width_multiplier=1 / 16,
        zero_init_residual=False,
        axis_name=DATA,
        kernels=kind,
        **kwargs,
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((16, 16, 16, 3), np.float32) + 1
    direction = rng.standard_normal((16, backbone.features), np.float32)
    variables = backbone.init(jax.random.key(0), images)

    def on_device(variables, images, direction):
        def loss(params):
            feature, changed = backbone.apply(
                variables | {'params': params}, images, train=True, mutable='batch_stats'
            )
            return (feature * direction).mean(), (feature, changed)

        params = jax.lax.pcast(variables['params'], (DATA,), to='varying')
        gradients, (feature, changed) = jax.grad(loss, has_aux=True)(params)
        return feature, jax.lax.pmean(gradients, DATA), changed

    on_devices = jax.shard_map(
        on_device,
        mesh=mesh_lib.make_mesh(jax.devices()[:devices]),
        in_specs=(P(), P(DATA), P(DATA)),
        out_specs=(P(DATA), P(), P()),
    )
    return jax.device_get(jax.jit(on_devices)(variables, images, direction))


@pytest.fixture(scope='module')
def plain():
    return features('plain', 1)


def distances(actual, expected) -> dict[str, float]:
    """Returns the largest difference in every array, relative to its largest value."""
    return {
        jax.tree_util.keystr(path): float(np.abs(a - e).max() / np.abs(e).max())
        for (path, e), a in zip(
            jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
        )
    }


@pytest.mark.parametrize('devices', [1, 8])
def test_fused_gradients_and_statistics_equal_plain(plain, devices: int) -> None:
    expected = plain if devices == 1 else features('plain', devices)
    fused = features('fused', devices)
    assert jax.tree.structure(fused) == jax.tree.structure(expected)
    assert min(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-3
    assert max(distances(fused, expected).values()) < 1e-5


@pytest.mark.long
def test_fused_bfloat16_with_remat_is_as_accurate_as_plain(plain) -> None:
    plain_error, fused_error = (
        np.mean(list(distances(features(kind, 1, dtype='bfloat16', remat=True), plain).values()))
        for kind in ('plain', 'fused')
    )
    assert 0 < fused_error < 1.2 * plain_error


def test_auto_kernels_are_fused_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kernels.are_fused(name) for name in kernels.KERNELS] == [False, False, True]
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert [kernels.are_fused(name) for name in kernels.KERNELS] == [True, False, True]
