"""Tests of configs/ablations.py, tools/ledger/, alternation.py and moving_average.py."""

import json
import pathlib
import runpy
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data import files, overlap, sources
from simsiam_jax.methods import losses, moving_average, simsiam
from simsiam_jax.models import resnet
from simsiam_jax.models.network import Outputs
from simsiam_jax.tasks import pretrain, pretrain_setup
from simsiam_jax.tools.ledger import ablation_report, run_ablations
from simsiam_jax.training import alternation, optim, step
from simsiam_jax.training import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('_compiled_quickly')

ROOT = pathlib.Path(__file__).parent.parent
FILE = runpy.run_path(str(ROOT / 'configs' / 'ablations.py'))
ROWS, get_config = FILE['ROWS'], FILE['get_config']
BACKBONE = {'stem': 'cifar', 'width_multiplier': 1 / 16, 'stages': (1, 1)}


def views_of(*z: list) -> list[Outputs]:
    return [Outputs(feature=None, z=jnp.array(x), p=2 * jnp.array(x)) for x in z]


def method(axis_name: str | None = mesh_lib.DATA, **arguments):
    backbone = resnet.make('resnet18', **BACKBONE, axis_name=axis_name)
    return simsiam.make(backbone, **({'dim': 8, 'predictor_hidden_dim': 4} | arguments))


def batches(count: int, size: int = 8, views: int = 2) -> list[dict]:
    rng = np.random.default_rng(0)
    shape = (views, size, 8, 8, 3)
    return [
        {'views': list(rng.standard_normal(shape).astype(np.float32)), 'index': np.arange(size)}
        for _ in range(count)
    ]


def to_views(batch: dict) -> list:
    return batch['views']


@pytest.fixture
def _imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the source by 1,281,167 images that are never read."""
    source = files.FileSource(['none.png'] * 1281167, [0] * 1281167, ('a', 'b'))
    monkeypatch.setattr(sources, 'open_source', lambda spec, *arguments: source)
    monkeypatch.setattr(overlap, 'shared_images', lambda train, test: [])


def imagenet(name: str):
    config = get_config(name)
    config.data.backend = 'host'
    config.model.stages = (1, 1, 1, 1)  # the minimum depth
    return config


@pytest.mark.usefixtures('_imagenet')
def test_all_rows_build_on_imagenet() -> None:
    for name in ROWS:
        config = imagenet(name)
        parts = pretrain_setup.build(config)
        alternating = isinstance(pretrain_setup.build_step(config, parts), alternation.Alternating)
        assert alternating == name.startswith('alternate')


@pytest.mark.usefixtures('_imagenet')
@pytest.mark.parametrize(
    'name',
    [
        name
        for name in ROWS
        # The programs of these are others' of the list, or of tests/test_config.py.
        if not name.startswith(('batch', 'width', 'alternate_1'))
        and name not in ('bn_default', 'predictor_fixed', 'predictor_decayed')
        and name not in ('simclr', 'moco_v2', 'byol', 'swav')
    ],
)
def test_row_steps_on_imagenet(name: str) -> None:
    config = imagenet(name)
    parts = pretrain_setup.build(config)
    before = jax.eval_shape(parts.init)
    batch = {
        'views': [
            jax.ShapeDtypeStruct((config.batch_size, r.size, r.size, 3), np.float32)
            for r in parts.recipes
        ],
        'index': jax.ShapeDtypeStruct((config.batch_size,), np.int32),
    }
    cached = pretrain_setup.block_of(config, parts) > 1
    if cached:
        batch['target'] = [
            jax.ShapeDtypeStruct((config.batch_size, config.method.dim), np.float32)
        ] * 2
    train_step = step.make_train_step(
        parts.method, parts.tx, parts.mesh, to_views, cached_targets=cached
    )
    after, _ = jax.eval_shape(train_step, before, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )


def heads_of(name: str) -> int:
    config = get_config(name)
    config.model.stages = (1,)
    built = pretrain_setup.build_method(config)
    params = jax.eval_shape(
        lambda key: built.network.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0)
    )['params']
    leaves = jax.tree.leaves({key: params[key] for key in params if key != 'backbone'})
    return sum(leaf.size for leaf in leaves)


def test_rows_have_expected_numbers_of_parameters() -> None:
    # The feature of one stage has width 256. fc1 is 256 -> 2048, fc2 and fc3 are 2048 -> 2048, and
    # the predictor is 2048 -> 512 -> 2048 with a last bias. BN has scale and bias, except on the
    # projector's output.
    fc = 256 * 2048 + 2 * 2048 * 2048 + 2 * 2048 * 512
    bn, predictor_bn, biases = 2 * 2 * 2048, 2 * 512, 2048
    default = fc + bn + predictor_bn + biases
    assert heads_of('baseline') == heads_of('bn_default') == default
    assert heads_of('bn_hidden') == default + 2048  # a bias replaces the BN
    assert heads_of('bn_none') == fc + 3 * 2048 + 512 + biases
    assert heads_of('bn_all') == default + 2 * 2048 - 2048  # scale and bias replace the bias
    assert heads_of('predictor_none') == default - 2 * 2048 * 512 - predictor_bn - biases
    assert heads_of('predictor_fixed') == heads_of('predictor_decayed') == default
    assert heads_of('width_256') == 3 * 256 * 256 + 4 * 256 + 2 * 256 * 64 + 2 * 64 + 256


def test_rows_cover_paper_and_refuse_unknown_names() -> None:
    assert {row.where for row in ROWS.values()} >= {'Fig. 2', 'Table 1', 'Table 2', 'Table 3'}
    assert get_config('batch_4096').optim.warmup_epochs == 10
    assert get_config('batch_512').optim.warmup_epochs == 0
    assert get_config('bn_none').optim.warmup_epochs == 10
    digits = get_config('width_512,digits')
    assert (digits.method.dim, digits.method.predictor_hidden_dim) == (32, 8)
    with pytest.raises(errors.UserError, match=r"'no_stop_gradent'.*no_stop_gradient"):
        get_config('no_stop_gradent')


def test_softmax_cross_entropy_equals_hand_computation() -> None:
    p, z = jnp.array([[0.0, 0.0], [1.0, 3.0]]), jnp.array([[0.0, np.log(3.0)], [5.0, 5.0]])
    # softmax z = (1/4, 3/4) and (1/2, 1/2); log softmax p = -log 2 and (-2, 0) - log(1 + e^-2).
    expected = (np.log(2) + 1 + np.log1p(np.exp(-2))) / 2
    np.testing.assert_allclose(losses.softmax_cross_entropy(p, z), expected, rtol=1e-6)


def test_asymmetric_losses_equal_hand_computation() -> None:
    e1, e2, both = [[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]

    def loss(pairs: str, online: list[Outputs]) -> float:
        return float(method(None, pairs=pairs).loss(online, online[:2], None)[0])

    half = -np.sqrt(0.5)
    online = views_of(e1, both)
    online[1] = Outputs(feature=None, z=jnp.array(both), p=jnp.array(e2))
    assert loss('asymmetric', online) == pytest.approx(half)  # p1 = e1 with z2
    assert loss('symmetric', online) == pytest.approx(half / 2)  # p2 = e2 with z1 = e1 gives 0
    four = views_of(e1, e2, both, e2)
    assert loss('two_asymmetric', four) == pytest.approx((half - 1) / 2)
    with pytest.raises(errors.UserError, match='with 2 views; expected four views'):
        loss('two_asymmetric', online)


def test_fixed_predictor_keeps_every_bit() -> None:
    tx, rates = optim.make(batch_size=256, epochs=1, steps_per_epoch=4, predictor_schedule='fixed')
    mesh = mesh_lib.make_mesh()
    start = jax.device_get(step.init_state(method(), tx, 0, (8, 8, 3)))
    train_step = step.make_train_step(method(), tx, mesh, to_views)
    state = mesh_lib.replicate(start, mesh)
    for batch in batches(2):
        state, _ = train_step(state, mesh_lib.shard(batch, mesh))
    for a, b in zip(
        jax.tree.leaves(start.params['predictor']),
        jax.tree.leaves(state.params['predictor']),
        strict=True,
    ):
        assert a.tobytes() == np.asarray(b).tobytes()
    assert (
        start.params['projector']['fc1']['kernel'] != state.params['projector']['fc1']['kernel']
    ).any()
    assert rates['lr_predictor'](3) == 0


def alternating(k: int, last: int, all_batches: list[dict], dtype=np.float32):
    tx, mesh = optax.sgd(0.1, momentum=0.9), mesh_lib.make_mesh()
    train_step = step.make_train_step(method(), tx, mesh, to_views, cached_targets=True)

    def load(start: int, stop: int):
        return (mesh_lib.shard(batch, mesh) for batch in all_batches[start:stop])

    wrapped = alternation.Alternating(
        method(), train_step, mesh, to_views, load, k=k, last=last, dtype=dtype
    )
    state = mesh_lib.replicate(step.init_state(method(), tx, 0, (8, 8, 3)), mesh)
    return wrapped, state, load


def test_alternating_each_step_equals_simsiam_bit_for_bit() -> None:
    four = batches(4)
    wrapped, state, load = alternating(1, 4, four)
    mesh, tx = mesh_lib.make_mesh(), optax.sgd(0.1, momentum=0.9)
    plain = step.make_train_step(method(), tx, mesh, to_views)
    same = mesh_lib.replicate(step.init_state(method(), tx, 0, (8, 8, 3)), mesh)
    for batch in load(0, 4):
        state, _ = wrapped(state, batch)
        same, _ = plain(same, batch)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_alternating_blocks_equal_plain_reference() -> None:
    seven = batches(7)
    wrapped, state, load = alternating(3, 7, seven)
    alone = method(None)
    start = step.init_state(alone, optax.sgd(0.1, momentum=0.9), 0, (8, 8, 3))
    params, stats = start.params, start.batch_stats
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(params)

    def views_in(batch) -> list:
        return [jnp.asarray(view) for view in batch['views']]

    @jax.jit
    def z_of(params, stats, batch) -> list:
        return [o.z for o in step.forward_views(alone.network, params, stats, views_in(batch))[0]]

    @jax.jit
    def gradient(params, stats, batch, z):
        def loss(params):
            online, after = step.forward_views(alone.network, params, stats, views_in(batch))
            value = losses.negative_cosine(online[0].p, z[1]) / 2
            return value + losses.negative_cosine(online[1].p, z[0]) / 2, after

        return jax.grad(loss, has_aux=True)(params)

    for block in ((0, 1, 2), (3, 4, 5), (6,)):
        targets = [z_of(params, stats, seven[i]) for i in block]
        for i, z in zip(block, targets, strict=True):
            grads, stats = gradient(params, stats, seven[i], z)
            updates, opt_state = tx.update(grads, opt_state)
            params = optax.apply_updates(params, updates)
    for batch in load(0, 7):
        state, _ = wrapped(state, batch)
    for a, b in zip(
        jax.tree.leaves((state.params, state.batch_stats)),
        jax.tree.leaves((params, stats)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)
    plain, same, load = alternating(1, 7, seven)
    for batch in load(0, 7):
        same, _ = plain(same, batch)
    largest = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, same.params)
    assert max(jax.tree.leaves(largest)) > 2e-3  # otherwise the comparison proves nothing


def test_cache_of_targets_has_announced_size() -> None:
    wrapped, state, load = alternating(3, 3, batches(3), dtype=jnp.bfloat16)
    wrapped(state, next(load(0, 1)))
    size = sum(z.nbytes for batch in wrapped._cache for z in batch)
    assert size == alternation.cache_bytes(3, 8, 8, jnp.bfloat16) * 2 / 3  # one is used


@pytest.mark.parametrize('devices', [1, 8])
def test_moving_average_equals_closed_form(devices: int) -> None:
    backbone = resnet.make('resnet18', **BACKBONE, axis_name=mesh_lib.DATA)
    built = moving_average.make(backbone, images=20, average=0.8, dim=8)
    rng = np.random.default_rng(0)
    visits = [(rng.permutation(20)[:8], *rng.standard_normal((2, 8, 8))) for _ in range(4)]
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    spec = jax.sharding.PartitionSpec

    @jax.jit
    @lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(spec(), *[spec('data')] * 3), out_specs=(spec(), spec())
    )
    def visit(memory, index, z1, z2):
        online = [Outputs(feature=None, z=z, p=z) for z in (z1, z2)]
        loss, memory, _ = built.loss(online, online, memory, index)
        return jax.lax.pmean(loss, 'data'), memory

    memory = built.init_method_state(jax.random.key(0))
    seen: dict[int, np.ndarray] = {}

    def cosine(a, b) -> float:
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for index, z1, z2 in visits:
        loss, memory = visit(memory, index, z1.astype(np.float32), z2.astype(np.float32))
        expected = 0.0
        for i, a, b in zip(index, z1, z2, strict=True):
            before = seen.get(i)
            towards = (b, a) if before is None else [0.8 * before + 0.2 * z for z in (b, a)]
            expected -= (cosine(a, towards[0]) + cosine(b, towards[1])) / 2 / 8
            mean = (a + b) / 2
            seen[i] = mean if before is None else 0.8 * before + 0.2 * mean
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for i in range(20):
        np.testing.assert_allclose(memory[i], seen.get(i, np.zeros(8)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'alternate.steps': -1}, r'alternate\.steps is -1; expected 1 or more'),
        ({'alternate.steps': 3, 'method.momentum': 0.9}, r'expected 1, unless .*simsiam without'),
        ({'alternate.steps': 3, 'debug_nans': True}, r'Set config\.alternate\.steps=1'),
        ({'alternate.steps': 3, 'alternate.dtype': 'int8'}, r"alternate\.dtype is 'int8'"),
        ({'method.similarity': 'dot'}, r"method\.similarity is 'dot'"),
        ({'optim.predictor_schedule': 'none'}, r"optim\.predictor_schedule is 'none'"),
    ],
)
def test_build_refuses_wrong_values(change: dict, message: str) -> None:
    config = get_config('baseline,digits')
    config.update_from_flattened_dict(change)
    with pytest.raises(errors.UserError, match=message):
        pretrain_setup.build_step(config, pretrain_setup.build(config))


def test_build_refuses_other_number_of_averages() -> None:
    config = get_config('moving_average,digits')
    config.method.images = 1000
    with pytest.raises(errors.UserError, match=r'images is 1000, but digits/train has 1437'):
        pretrain_setup.build(config)


@pytest.mark.parametrize('row', ['moving_average', 'alternate_10'])
def test_run_of_section_5_2_reports_memory_and_resumes(row, tmp_path, capsys) -> None:
    config = get_config(f'{row},digits')
    config.update_from_flattened_dict(
        {
            'batch_size': 256,
            'epochs': 4,  # of five steps
            'model.width_multiplier': 0.125,
            'model.stages': (1,),
            'checkpoint.every_epochs': 1,
            'checkpoint.max_to_keep': 9,
            'eval.train': '',
            'eval.test': '',
            'guard': 'off',
            'log.tensorboard': False,
            'log.report': False,
            'augment.rotation': 0.0,  # compiles faster
        }
    )
    if row == 'alternate_10':
        config.alternate.steps = 7  # checkpoints are at the ends of blocks
    pretrain.run(config, str(tmp_path))
    printed = capsys.readouterr().out
    folder = tmp_path / checkpoint_reader.FOLDER
    if row == 'alternate_10':
        assert checkpoint_reader.list_steps(folder) == [7, 14, 20]
        assert 'caching the targets of 7 steps: 2 MiB' in printed  # 7 x 2 x 256 x 128 floats
    else:
        assert checkpoint_reader.list_steps(folder) == [5, 10, 15, 20]
        assert 'keeps 0.7 MiB between steps on each device: float32[1437, 128]' in printed
    whole = checkpoint_reader.load(tmp_path, 'state')
    for step_ in checkpoint_reader.list_steps(folder)[1:]:
        shutil.rmtree(folder / str(step_))
    pretrain.run(config, str(tmp_path))
    assert 'resuming from step' in capsys.readouterr().out
    again = checkpoint_reader.load(tmp_path, 'state')
    assert again.step == whole.step == 20
    jax.tree.map(np.testing.assert_array_equal, again.tree, whole.tree)


@pytest.mark.long
def test_ledger_runs_rows_once_and_resumes(command, tmp_path) -> None:
    def start(*names: str) -> str:
        given = (f'--workdir={tmp_path}', f'--rows={",".join(names)}', '--seeds=1', '--epochs=1')
        done = command('simsiam_jax.tools.ledger', *given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert start('baseline', 'bn_default').count('left') == 1  # identical configurations
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ['baseline']
    first = tmp_path / 'baseline' / '0' / 'result.json'
    result, written = json.loads(first.read_text()), first.stat().st_mtime_ns
    assert 0 < result['linear'] <= 1

    names = ('baseline', 'bn_default', 'no_stop_gradient')
    assert start(*names).count('left') == 1
    assert first.stat().st_mtime_ns == written
    text = (tmp_path / 'ledger.md').read_text()
    for name in names:
        (line,) = [line for line in text.splitlines() if line.startswith(f'| {name} |')]
        assert ROWS[name].paper in line
        assert (f'{result["knn"]:.3f} | {result["linear"]:.3f}' in line) == name.startswith('b')
    assert (tmp_path / 'figure2.png').stat().st_size > 10_000

    metrics = tmp_path / 'cross_entropy' / '0' / 'metrics.jsonl'
    given = [f'--workdir={tmp_path}', '--rows=cross_entropy', '--seeds=1', '--epochs=200']
    line = [sys.executable, '-m', 'simsiam_jax.tools.ledger', *given]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and 'train/loss' in metrics.read_text()):
        time.sleep(0.1)
    process.terminate()
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 143
    assert printed == 'stopped: rerun the same command to resume\n'

    first.unlink()  # as if the run had been killed
    assert start('baseline').count('left') == 1
    assert json.loads(first.read_text())['loss'] == result['loss']


def test_ledger_never_reuses_results_of_other_settings(tmp_path, monkeypatch) -> None:
    ran = []

    def run_once(config, folder):
        folder.mkdir(parents=True)
        ran.append(config.data.source)
        config.augment.mean = (0.0,)  # a run fills in what it measures
        return dict.fromkeys(ablation_report.COLUMNS, float(config.epochs))

    def start(data: str, epochs: int) -> list:
        configs = {'baseline': lambda: get_config(f'baseline,{data}')}
        return run_ablations.run_all(configs, tmp_path, 1, epochs)['baseline']

    monkeypatch.setattr(run_ablations, 'run_once', run_once)
    assert start('digits', 4)[0]['knn'] == 4.0
    assert start('digits', 4)[0]['knn'] == 4.0
    assert ran == ['digits/train']
    with pytest.raises(errors.UserError, match=r'another configuration: .*epochs \(4 -> 5\)'):
        start('digits', 5)
    other = r"data\.source \('digits/train' -> 'npz:a\.npz/train\[:5000\]'\)"
    with pytest.raises(errors.UserError, match=other):
        start('cifar10_small,npz:a.npz', 4)
    path = tmp_path / 'baseline' / '0' / 'result.json'
    path.write_text(json.dumps({'knn': 1.0}))
    with pytest.raises(errors.UserError, match='does not say what it was measured with'):
        start('digits', 4)
    assert ran == ['digits/train']


def test_ledger_selects_core_rows_and_shortens_warmup() -> None:
    assert run_ablations.select_rows(FILE, 'core') == list(FILE['CORE'])
    assert set(FILE['CORE']) < set(ROWS)
    bn_none = get_config('bn_none,cifar10_small')
    assert run_ablations.prepare(bn_none, 0, 8).optim.warmup_epochs == 2
    assert run_ablations.prepare(get_config('bn_none'), 0, 100).optim.warmup_epochs == 10


def test_words_after_the_data_go_to_its_configuration() -> None:
    config = get_config('width_512,cifar10_small,npz:c.npz')
    assert config.data.source == config.eval.train == 'npz:c.npz/train[:5000]'
    assert (config.eval.test, config.method.dim) == ('npz:c.npz/test[:2000]', 32)
    assert get_config('batch_4096,cifar10_small').batch_size == 1024
    assert get_config('baseline,cifar10,npz:c.npz').data.source == 'npz:c.npz/train'


def test_ledger_refuses_unknown_rows(command, tmp_path) -> None:
    done = command('simsiam_jax.tools.ledger', f'--workdir={tmp_path}', '--rows=baselin')
    assert done.returncode == 1
    assert "'baselin'" in done.stderr
    assert 'baseline' in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('ROWS = {}\n1 / 0\n', '.py failed in line 2: ZeroDivisionError: division by zero. Fix'),
        ('ROWS = {"a": "b"}\n', '.py has no ROWS or no get_config(); pass a file like'),
        (
            'ROWS = {"a": "b"}\ndef get_config(words):\n    return words.a\n',
            ".py:a,digits failed in line 3: AttributeError: 'str' object has no attribute 'a'. Fix",
        ),
    ],
)
def test_ledger_names_the_line_of_a_broken_file(command, tmp_path, text: str, message: str) -> None:
    (tmp_path / 'broken.py').write_text(text)
    flags = [f'--config={tmp_path}/broken.py', f'--workdir={tmp_path}']
    done = command('simsiam_jax.tools.ledger', *flags)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
    assert message in done.stderr
    assert done.stderr.count('\n') == 1
