"""Tests of tools/benchmark/: cost_model.py, hardware.py, workload.py, speed.py, aot.py, input."""

import functools
import re
from collections.abc import Iterator

import jax
import pytest
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.methods import METHODS
from simsiam_jax.models import resnet
from simsiam_jax.tools.benchmark import aot, cost_model, hardware, hlo, input_speed, speed, workload
from simsiam_jax.training import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('_compiled_quickly')


def small(method: str = 'simsiam', **changes: object) -> ConfigDict:
    """Returns a configuration of two blocks on 16 pixels, batch 32."""
    config = config_lib.default()
    config.batch_size, config.epochs, config.augment.size = 32, 1, 16
    config.model.update({'name': 'resnet18', 'stages': (1, 1), 'width_multiplier': 0.125})
    config.model.update({'dtype': 'float32', 'kernels': 'plain'})
    config.method = ConfigDict({'name': method, 'dim': 32, 'predictor_hidden_dim': 8})
    config.update_from_flattened_dict(changes)
    return config


def test_layers_of_resnet50_equal_torchvision() -> None:
    layers = cost_model.layers(METHODS['simsiam'](resnet.make('resnet50')).network, 224, 3)
    products = [layer for layer in layers if layer.kind == 'product']
    heads = 3 * 2048**2 + 2 * 2048 * 512
    # torchvision counts 4,089,184,256 multiplications, with the classifier's.
    assert sum(layer.macs for layer in products) == 4_089_184_256 - 2048 * 1000 + heads
    assert sum(layer.weights for layer in products) == 25_557_032 - 53_120 - 2_049_000 + heads
    assert len([layer for layer in layers if layer.kind == 'norm']) == 53 + 4
    assert [layer.kind for layer in layers].count('block') == 16
    # 24 GFLOP per view, forward and backward; the images need no gradient.
    stem = 2 * 112 * 112 * 64 * 7 * 7 * 3
    forward = 2 * sum(layer.macs for layer in products)
    kernels = cost_model.kernels(layers, 4, 'fused', 2)
    assert sum(kernel.flops for kernel in kernels) == 4 * (3 * forward - stem)


def test_kernels_of_norm_equal_hand_count() -> None:
    """Each level of fusion reads and writes whole arrays of a norm of 10 elements."""
    layer = cost_model.Layer('norm', 10, 10, weights=5, relu=True)
    array = 3 * 2 * 10  # three images, two bytes
    for fusion, forward, backward in (('separate', 5, 8), ('fused', 3, 5), ('ideal', 0, 3)):
        alone = cost_model.kernels([layer], 3, fusion, 2, backward=False)
        both = cost_model.kernels([layer], 3, fusion, 2)
        assert sum(kernel.bytes for kernel in alone) == forward * array
        assert sum(kernel.bytes for kernel in both) == (forward + backward) * array
    assert cost_model.statistics_bytes([layer]) == [40, 40]


def test_find_matches_device_kind_by_longest_prefix() -> None:
    assert hardware.find('TPU v5 lite') is hardware.DEVICES['TPU v5 lite']
    assert hardware.find('TPU v5p') is hardware.DEVICES['TPU v5']
    assert hardware.find('NVIDIA H100 80GB HBM3') is hardware.DEVICES['NVIDIA H100']
    assert hardware.find('cpu') is None
    # Two devices exchange halves, then sums.
    assert hardware.all_reduce_seconds(100, 2, 50.0) == 2.0
    assert hardware.all_reduce_seconds(100, 1, 50.0) == 0.0


@pytest.mark.parametrize('method', ['simsiam', pytest.param('swav', marks=pytest.mark.long)])
def test_compile_step_agrees_with_analytic_costs(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(
        method, **{'optim.gradient_accumulation_steps': 2} if method == 'simsiam' else {}
    )
    if method == 'swav':
        config.method.prototypes = 64
    work = workload.build(config, mesh_lib.make_mesh(), images=640)
    result = aot.compile_step(work)
    assert result.counts is not None
    state = jax.eval_shape(work.init)
    assert len(result.counts.donated) == len(jax.tree.leaves(state))
    sums = work.allreduce_bytes()
    sent = sum(sums['gradients']) + sum(sums['BN statistics'])
    if method == 'swav':
        sent += 2 * config.batch_size * config.method.dim * 4  # z of two views, for Sinkhorn
    (collective,) = result.counts.collectives
    assert (collective.op, collective.devices) == ('all-reduce', 8)
    assert collective.count <= len(sums['BN statistics']) + 8
    # The loss, the metrics and the spread of z add some hundred numbers.
    assert sent <= collective.bytes <= sent + 4096
    # The analytic count leaves out padding and the products of the losses.
    analytic = sum(kernel.flops for kernel in work.analytic_kernels('fused'))
    flops = sum(kernel.flops * kernel.runs for kernel in result.counts.kernels)
    assert analytic == pytest.approx(flops, rel=0.25)
    monkeypatch.setattr(hardware, 'find', lambda kind: hardware.DEVICES['NVIDIA H100'])
    text = aot.report(result)
    assert f'all-reduce between 8: {collective.count} with' in text
    assert f'compiled: {result.counts.launches} kernels' in text


def test_largest_batch_searches_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip of 100 MB with 1 MB per image beside the state, the first guess is too large."""
    tries = []

    def compile_step(work: workload.Workload) -> aot.Compiled:
        batch = work.config.batch_size // 8
        tries.append(batch)
        return aot.Compiled(work, batch * 10**6 + (9 * 10**6 if batch > 4 else 0), hlo.count(''))

    chip = hardware.Device(1e12, 1e9, 100 * 10**6, 1e9)
    monkeypatch.setattr(hardware, 'find', lambda kind: chip)
    monkeypatch.setattr(hlo, 'count', lambda text: hlo.Counts((), (), (), (), frozenset(), ()))
    monkeypatch.setattr(aot, 'compile_step', compile_step)
    result = compile_step(workload.build(small(), mesh_lib.make_mesh(), images=640))
    best = aot.largest_batch(result, images=640, image_size=0)
    # 91 images fit. The first try is extrapolated from four images.
    assert best == (88, 97 * 10**6)
    assert tries[1] > tries[-1] == 88


@pytest.mark.long
def test_measure_prints_speed_with_and_without_data(capsys: pytest.CaptureFixture) -> None:
    config = small(**{'data.source': 'digits/train', 'data.channels': 1})
    config.update_from_flattened_dict({'eval.train': '', 'eval.test': '', 'augment.size': 8})
    config.augment.update({'mean': (0.3,), 'std': (0.4,)})
    speed.measure(config, [16], with_data=True, images=640, image_size=8, rounds=1)
    _, header, row, with_input = capsys.readouterr().out.splitlines()
    assert 'images/s' in header
    batch, rate, milliseconds = (float(x.replace(',', '')) for x in row.split()[:3])
    assert batch == 16
    assert rate == pytest.approx(batch / milliseconds * 1e3, rel=0.1)
    assert re.fullmatch(
        r'with the input of digits/train: [\d,]+ images/s, data wait \d+%', with_input
    )


def test_workload_and_topology_refuse_what_cannot_compile() -> None:
    with pytest.raises(errors.UserError, match='v9:2x2'):
        aot.topology('v9:2x2')
    with pytest.raises(errors.UserError, match='alternate'):
        workload.build(small(**{'alternate.steps': 10}), mesh_lib.make_mesh(), images=640)


def compiled_for_h100(on_device: str) -> aot.Compiled:
    """Compiles the step of the ImageNet configuration at batch 512 for one H100."""
    pytest.importorskip('jax_plugins.xla_cuda12', reason='jax_cuda12_plugin is not installed')
    config = config_lib.default()
    config.model.kernels, config.data.on_device = 'fused', on_device
    return aot.compile_step(workload.build(config, mesh_lib.make_mesh(aot.topology('h100'))))


@pytest.fixture(scope='module')
def h100() -> aot.Compiled:
    """Returns the step with views from the host."""
    return compiled_for_h100('none')


def test_step_on_h100_stays_within_its_bytes(h100: aot.Compiled) -> None:
    counts = h100.counts
    assert counts is not None
    assert counts.bytes <= 370e9
    assert counts.launches <= 1650
    assert counts.scatters == ()
    # Only weights are float32 or transposed.
    largest_weight = 512 * 3 * 3 * 512 * 4
    assert counts.float32[0].bytes <= 2048 * 2048 * 4
    assert counts.moves[0].bytes <= largest_weight
    assert len(counts.donated) == len(jax.tree.leaves(jax.eval_shape(h100.work.init)))
    assert h100.memory < 60 * 2**30
    analytic = sum(kernel.flops for kernel in h100.work.analytic_kernels('fused'))
    flops = sum(kernel.flops * kernel.runs for kernel in counts.kernels)
    assert analytic == pytest.approx(flops, rel=1e-3)


def test_augmentation_adds_few_bytes_to_step_on_h100(h100: aot.Compiled) -> None:
    alone, whole = h100.counts, compiled_for_h100('color').counts
    assert alone is not None
    assert whole is not None
    assert whole.bytes < 1.03 * alone.bytes


@pytest.mark.parametrize('channels', [1, 4])
def test_workload_needs_no_images_to_normalize(channels: int) -> None:
    config = small(**{'data.normalize': 'auto', 'data.channels': channels})
    state, batch = workload.build(config, mesh_lib.make_mesh(), images=640).abstract()
    assert state.params['backbone']['conv1']['kernel'].shape[2] == channels
    assert batch['crops'][0].shape[-1] == channels
    assert config.data.normalize == 'auto'  # the caller's is unchanged


def test_columns_of_speed_never_touch() -> None:
    work = workload.build(small(), mesh_lib.make_mesh(), images=640)
    counts = hlo.Counts((), (), (), (), frozenset(), ())
    for seconds, memory in ((12.3, 811_748_818), (1e-4, 10**15)):
        row = speed.Speed(work, [seconds] * 3, 9876543.21, memory, counts).row()
        assert len(row.split()) == len(speed.HEADER)


def test_input_rates_leave_out_buffered_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(input_speed.time, 'perf_counter', lambda: now)
    monkeypatch.setattr(input_speed.time, 'process_time', lambda: 2 * now)
    streams = []

    def load(count: int) -> Iterator[int]:
        nonlocal now
        streams.append(count)
        for i in range(count):  # each batch takes a second, except those in the buffers
            now += 1.0 if 4 <= i < count - 4 else 0.0
            yield i

    assert input_speed.rates(load, 32) == (32.0, 16.0, 23)
    assert input_speed.rates(load, 32, 6)[:2] == (32.0, 16.0)
    assert streams == [16, 28, 14]


def test_input_advice_prefers_least_work_for_device_that_keeps_up() -> None:
    delivered = {'none': 90.0, 'color': 300.0, 'all': 900.0}
    advice = functools.partial(input_speed.advice, delivered, accelerator=True)
    assert advice(80.0).startswith('data.on_device=none suits:')
    assert advice(100.0).startswith('data.on_device=color suits:')
    assert advice(800.0).startswith('data.on_device=all suits:')
    assert 'the training waits for input: 900 of 1,000 images/s' in advice(1000.0)
    on_cpu = input_speed.advice(delivered, 800.0, accelerator=False)
    assert on_cpu.startswith('data.on_device=none suits: without an accelerator')
