"""Tests of tasks/supervised.py, probe.py, knn.py, eval_setup.py and selection.py on a run."""

import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from configurations import load
from ml_collections import ConfigDict
from PIL import Image
from sklearn.linear_model import LogisticRegression

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.data import files, sources, subset, tfds_source
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.runtime import distributed
from simsiam_jax.tasks import eval_setup, knn, loop, pretrain, probe, selection, supervised
from simsiam_jax.tasks.features import CropLoader, Features, extract_features
from simsiam_jax.training import classifier, optim, sgd_heads
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.step import TrainState


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the workdir of a short pre-training, on one device to be faster."""
    workdir = str(tmp_path_factory.mktemp('pretrained'))
    config = load('quickstart', epochs=20, guard='off', model__width_multiplier=0.125)
    config.eval.baselines = config.log.tensorboard = False
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, 'make_mesh', lambda: mesh)
        pretrain.run(config, workdir)
    return workdir


def linear(name: str, init_from: str, **overrides) -> ConfigDict:
    """Returns a configuration for digits: few steps, no flips."""
    small = {
        'init_from': init_from,
        'batch_size': 64,
        'epochs': 3,
        'augment.crop_scale': (0.6, 1.0),
        'augment.flip': 0.0,
        'log.tensorboard': False,
        'log.every_steps': 5,
    }
    return load(name, **(small | overrides))


def stored(workdir: pathlib.Path) -> dict:
    steps = [int(path.name) for path in (workdir / 'checkpoints').iterdir()]
    path = workdir / 'checkpoints' / str(max(steps)) / 'state'
    return ocp.StandardCheckpointer().restore(path)


def result(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / 'result.json').read_text())


@pytest.fixture(scope='module')
def swept(
    pretrained: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, ConfigDict]:
    """Runs a sweep over four heads; batches of 56 do not divide its 360 test images."""
    workdir = tmp_path_factory.mktemp('swept')
    config = linear(
        'linear:sweep',
        pretrained,
        **{
            'optim.learning_rates': (0.3, 3.0),
            'optim.weight_decays': (0.0, 1e-4),
            'eval.batch_size': 56,
        },
    )
    supervised.run(config, str(workdir))
    return workdir, config


def test_sweep_tests_chosen_head_on_every_image(swept, pretrained) -> None:
    workdir, _ = swept
    tested = result(workdir)
    head = jax.device_get(stored(workdir)['params']['head'])
    module, variables = simsiam_jax.load_encoder(pretrained)
    test = sources.open_source('digits/test')
    features = np.asarray(module.apply(variables, test.images / 255 / 0.38))
    (chosen,) = [
        i
        for i, row in enumerate(tested['heads'])
        if (row['learning_rate'], row['weight_decay'])
        == (tested['learning_rate'], tested['weight_decay'])
    ]
    outputs = features @ head['kernel'][chosen] + head['bias'][chosen]
    assert tested['images'] == len(test) == 360
    assert tested['top1'] == pytest.approx(np.mean(outputs.argmax(1) == test.labels), abs=1e-6)
    judged = json.loads((workdir / 'verdict.json').read_text())
    assert judged['images'] == 360
    assert judged['accuracy']['checkpoint']['top1'] == pytest.approx(tested['top1'], abs=1e-6)
    best = max(row['holdout_top1'] for row in tested['heads'])
    assert tested['heads'][chosen]['holdout_top1'] >= best - 0.05
    assert len(tested['heads']) == 4
    # The test set is not used before the end.
    curves = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in curves if 'eval/test_top1' in line] == [curves[-1]['step']]


def test_frozen_backbone_is_unchanged_bit_for_bit(swept, pretrained) -> None:
    workdir, _ = swept
    _, before = simsiam_jax.load_encoder(pretrained)
    _, after = simsiam_jax.load_encoder(workdir)
    assert jax.tree.map(lambda x: x.tobytes(), jax.device_get(before)) == jax.tree.map(
        lambda x: x.tobytes(), jax.device_get(after)
    )
    moved = jax.tree.map(lambda x: np.nextafter(x, np.inf), jax.device_get(before))
    state = TrainState(
        np.int32(0), {'backbone': moved['params']}, {'backbone': moved['batch_stats']}, *[None] * 3
    )
    with pytest.raises(RuntimeError, match=r'frozen backbone has changed in .*bn1.*mean'):
        supervised._check_unchanged(before, state)


def test_interrupted_run_resumes_bit_for_bit(swept, tmp_path, monkeypatch) -> None:
    finished_run, config = swept
    with monkeypatch.context() as patch:
        patch.setattr(distributed.PreemptionHandler, 'should_stop', lambda self, step: step == 25)
        with pytest.raises(SystemExit):
            supervised.run(config, str(tmp_path))
    assert not (tmp_path / 'result.json').exists()
    supervised.run(config, str(tmp_path))
    assert result(tmp_path) == result(finished_run)
    for a, b in zip(
        jax.tree.leaves(stored(tmp_path)), jax.tree.leaves(stored(finished_run)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # A run cannot be resumed with different images.
    config = config.copy_and_resolve_references()
    config.label_fraction = 0.5
    with pytest.raises(errors.UserError, match=r'label_fraction \(1\.0 -> 0\.5\)'):
        supervised.run(config, str(tmp_path))


def test_train_heads_jointly_equals_separately() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((64, 5)), rng.integers(0, 3, 64)
    data = Features(x.astype(np.float32), labels, np.arange(64))
    rates, decays = classifier.grid((0.1, 1.0), (0.0, 0.01))
    common = {'classes': 3, 'batch_size': 16, 'epochs': 3, 'momentum': 0.9, 'seed': 0}
    together = sgd_heads.train(data.x, data.labels, rates, decays, **common)
    for i in range(4):
        alone = sgd_heads.train(data.x, data.labels, rates[i : i + 1], decays[i : i + 1], **common)
        np.testing.assert_allclose(together['kernel'][i], alone['kernel'][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('frozen', [True, False])
def test_classifier_step_on_8_devices_equals_1(pretrained: str, frozen: bool) -> None:
    module, variables = simsiam_jax.load_encoder(pretrained)
    module = module.clone(axis_name=mesh_lib.DATA)
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.standard_normal((16, 8, 8, 1)).astype(np.float32),
        'label': np.arange(16, dtype=np.int32) % 10,
    }
    tx = optim.torch_sgd(0.1, 0.9, 0.0)
    heads = classifier.init_heads(1, module.features, 10, 0)
    trained = {'head': heads} | ({} if frozen else {'backbone': variables['params']})
    ends = []
    for devices in (1, 8):
        mesh = mesh_lib.make_mesh(jax.devices()[:devices])
        state = TrainState(
            jnp.int32(0),
            {'backbone': variables['params'], 'head': heads},
            {'backbone': variables['batch_stats']},
            tx.init(trained),
            None,
            None,
        )
        step = classifier.make_train_step(
            module, tx, mesh, lambda batch: [batch['image']], frozen=frozen
        )
        state, metrics = step(mesh_lib.replicate(state, mesh), mesh_lib.shard_global(batch, mesh))
        ends.append(jax.device_get((state.params, state.batch_stats, metrics)))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    moved = np.abs(
        ends[0][0]['backbone']['conv1']['kernel'] - variables['params']['conv1']['kernel']
    )
    assert (moved.max() > 0) is not frozen


@pytest.mark.long
def test_finetune_with_few_labels_learns(pretrained: str, tmp_path, capsys) -> None:
    config = linear('finetune:10pct', pretrained, **{'batch_size': 64, 'epochs': 30})
    config.optim.backbone_learning_rate = 0.1
    config.optim.learning_rates = (1.0,)
    supervised.run(config, str(tmp_path / 'checkpoint'))
    assert '143 training images of digits/train' in capsys.readouterr().out
    module, tuned = simsiam_jax.load_encoder(tmp_path / 'checkpoint')
    _, before = simsiam_jax.load_encoder(pretrained)
    assert (tuned['params']['conv1']['kernel'] != before['params']['conv1']['kernel']).any()
    assert module.apply(tuned, np.zeros((1, 8, 8, 1), np.float32)).shape == (1, module.features)
    config = linear('finetune:10pct', pretrained, from_scratch=True)
    supervised.run(config, str(tmp_path / 'scratch'))
    assert 'finetune from scratch of' in capsys.readouterr().out
    assert result(tmp_path / 'checkpoint')['top1'] > 0.8


def test_split_is_balanced_and_repeatable() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    kept, rest = subset.split(labels, 0.1, seed=0)
    assert np.bincount(labels[kept]).tolist() == [10, 5, 1]  # at least one
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, rest])), np.arange(153))
    np.testing.assert_array_equal(subset.split(labels, 0.1, seed=0)[0], kept)
    assert (subset.split(labels, 0.1, seed=1)[0] != kept).any()
    with pytest.raises(errors.UserError, match=r'share of the images is 1\.5'):
        subset.split(labels, 1.5, seed=0)


def test_subset_of_source_reads_like_whole(tmp_path) -> None:
    for name in 'abcd':
        (tmp_path / name).write_bytes(name.encode())
    source = files.FileSource([str(tmp_path / n) for n in 'abcd'], [0, 1, 0, 1], ('x', 'y'))
    part = subset.take(Reader(source, 3), np.array([3, 0]))
    assert [part.source.read(i) for i in range(len(part))] == [(b'd', 1), (b'a', 0)]
    assert part.source.name(0) == str(tmp_path / 'd')
    assert subset.labels(part).tolist() == [1, 0]
    assert part.classes == ('x', 'y')


def test_prepared_imagenet_subset_is_preferred(monkeypatch, pretrained) -> None:
    opened = []

    def opener(spec: str, data: ConfigDict):
        opened.append(spec)
        return sources.open_source('digits/train')

    monkeypatch.setattr(eval_setup.inputs, 'open_source', opener)
    config = load('finetune:1pct', init_from=pretrained)
    config.eval.train = 'tfds:imagenet2012/train'
    for prepared, expected in ((True, 'tfds:imagenet2012_subset/1pct/train'), (False, None)):
        opened.clear()
        monkeypatch.setattr(
            tfds_source, 'is_prepared', lambda spec, data_dir, there=prepared: there
        )
        setup = eval_setup.prepare(config)
        assert opened[0] == (expected or 'tfds:imagenet2012/train')
        assert len(setup.train) == (1437 if prepared else 14)


@pytest.mark.long
def test_probe_nears_converged_regression(pretrained: str, tmp_path) -> None:
    config = load('linear:cached', init_from=pretrained)
    probe.run(config, str(tmp_path))
    results = json.loads((tmp_path / 'probe.json').read_text())
    assert list(results) == ['raw pixels', 'random initialization', 'checkpoint']
    train, test = (sources.open_source(f'digits/{split}') for split in ('train', 'test'))
    x, y = (s.images.reshape(len(s), -1) / 255 for s in (train, test))
    reference = LogisticRegression(C=1.0, max_iter=10_000).fit(x, train.labels)
    accuracy = reference.score(y, test.labels)
    for kind in ('SGD', 'L-BFGS'):
        assert results['raw pixels'][kind]['top1'] == pytest.approx(accuracy, abs=0.01)
    for kind in ('SGD', 'L-BFGS'):
        assert results['checkpoint'][kind]['top1'] > results['random initialization'][kind]['top1']


@pytest.mark.parametrize(('limit', 'kinds'), [(1437 * 64, ['SGD', 'L-BFGS']), (0, ['SGD'])])
def test_probe_judges_better_kind_of_each_encoder(
    pretrained: str, tmp_path, capsys, limit: int, kinds: list[str]
) -> None:
    changes = {'logistic__limit': limit, 'logistic__strengths': (1.0,), 'epochs': 1}
    config = load('linear:cached', init_from=pretrained, **changes)
    config.augment.size = config.eval.resize = 16  # pixels have more values than features
    probe.run(config, str(tmp_path))
    judged = json.loads((tmp_path / 'verdict.json').read_text())['accuracy']
    results = json.loads((tmp_path / 'probe.json').read_text())
    assert list(judged) == ['raw pixels', 'random initialization', 'checkpoint']
    assert list(results['checkpoint']) == kinds
    assert list(results['raw pixels']) == kinds
    line = 'raw pixels: L-BFGS on a class-balanced sample of 359 of 1,437 training images'
    assert (line in capsys.readouterr().out) == (kinds != ['SGD'])
    best = kinds[-1]  # one epoch of SGD is behind a converged regression
    assert judged['checkpoint']['top1'] == pytest.approx(results['checkpoint'][best]['top1'])


def test_raw_pixels_are_reduced_to_principal_components(capsys) -> None:
    rng = np.random.default_rng(0)
    mix = np.abs(rng.normal(size=(40, 16 * 16 * 3)))
    mixed = np.abs(rng.normal(size=(900, 40))) @ mix
    images = np.uint8(255 * mixed / mixed.max()).reshape(900, 16, 16, 3)
    train, test = (ArraySource(x, np.zeros(len(x), int), ()) for x in (images[:600], images[600:]))
    mesh = mesh_lib.make_mesh()
    loader = CropLoader(mesh, channels=3, size=16, resize=0, batch_size=64)
    encode, variables = probe.pixel_encoder(train, loader, seed=0)
    assert 'raw pixels: 512 principal components of 768 values, 100.0%' in capsys.readouterr().out
    reduced = extract_features(encode, variables, test, loader).x
    assert reduced.shape == (300, 512)
    # Distances survive, so that nothing a linear classifier uses is lost.
    whole = images[600:].reshape(300, -1) / 255
    kept, expected = (np.linalg.norm(x[0] - x[1:9], axis=1) for x in (reduced, whole))
    np.testing.assert_allclose(kept, expected, rtol=1e-3)
    small = CropLoader(mesh, channels=3, size=8, resize=8, batch_size=64)
    assert probe.pixel_encoder(train, small, seed=0)[1] == {}


def test_choose_prefers_calibrated_head_within_chance() -> None:
    top1 = np.array([0.90, 0.91, 0.80, np.nan])
    loss = np.array([0.3, 0.5, 0.1, np.nan])
    with np.errstate(invalid='ignore'):
        few = selection.choose(selection.HeadScores(np.nan_to_num(top1), top1, loss, 100))
        many = selection.choose(selection.HeadScores(np.nan_to_num(top1), top1, loss, 100_000))
    assert (few, many) == (0, 1)


def test_knn_task_equals_monitor_of_training(pretrained: str, tmp_path, capsys) -> None:
    knn.run(load('knn', init_from=pretrained, eval__bank_dtype='float32'), str(tmp_path))
    rows = json.loads((tmp_path / 'knn.json').read_text())
    assert len(rows) == 12
    assert '0.07' in capsys.readouterr().out
    monitored = [
        json.loads(line)
        for line in (pathlib.Path(pretrained) / 'metrics.jsonl').read_text().splitlines()
        if 'eval/knn_top1' in line
    ][-1]
    (same,) = [row for row in rows if (row['k'], row['temperature']) == (20, 0.2)]
    assert same['top1'] == pytest.approx(monitored['eval/knn_top1'], abs=1e-6)


@pytest.mark.parametrize('odd', ['train', 'test', ''])
def test_mistake_in_evaluation_appears_before_first_step(tmp_path, monkeypatch, odd: str) -> None:
    for part in ('train', 'test'):
        for i in range(4):
            folder = tmp_path / 'images' / part / 'ab'[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            side = 9 if part == odd and i == 3 else 8
            Image.new('L', (side, side), 60 * i).save(folder / f'{i}.png')

    monkeypatch.setattr(loop, 'train', mock.Mock(side_effect=RuntimeError('the first step')))
    sets = {f'eval__{part}': f'folder:{tmp_path}/images/{part}' for part in ('train', 'test')}
    config = load('quickstart', **sets, guard='off', data__backend='host', eval__k=1)
    config.model.width_multiplier, config.model.stages = 0.125, (1,)
    config.eval.baselines = config.log.tensorboard = False
    message = r'3\.png is 9x9; expected 8x8 .*eval\.resize is 0\. Set config\.eval\.resize'
    expected = (errors.UserError, message) if odd else (RuntimeError, 'the first step')
    with pytest.raises(expected[0], match=expected[1]):
        pretrain.run(config, str(tmp_path / 'run'))


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('linear', {'init_from': ''}, r'config\.init_from is not set'),
        ('linear', {'init_from': '/tmp'}, r'no checkpoint in /tmp/checkpoints'),
        ('linear', {'data.channels': 3}, r'channels is 3, but .* was trained with 1'),
        ('linear', {'augment.size': 16}, r'images are 8x8.*config\.eval\.resize'),
        ('linear', {'batch_size': 100}, r'batch_size is 100.*8 devices'),
        ('linear', {'eval.train': 'folder:/no/such'}, r'/no/such does not exist'),
        ('linear', {'optim.learning_rates': (1.0, 2.0)}, r'2 heads .*holdout is 0'),
        ('linear', {'optim.name': 'adam'}, r"optim\.name is 'adam'"),
        ('linear:cached', {'eval.holdout': 0.0}, r'holdout is 0\.0; expected a share'),
        ('finetune', {'label_fraction': 0.0}, r'share of the images is 0\.0'),
        ('knn', {'eval.k': (0,)}, r'eval\.k is \(0,\)'),
        ('knn', {'eval.bank_dtype': 'int8'}, r"bank_dtype is 'int8'"),
    ],
)
def test_tasks_reject_wrong_values_in_one_line(
    pretrained: str, tmp_path, name: str, change: dict, message: str
) -> None:
    tasks = {'linear': supervised.run, 'finetune': supervised.run, 'probe': probe.run}
    tasks['knn'] = knn.run
    config = load(name, **({'init_from': pretrained} | change))
    if name in ('linear', 'finetune') and 'batch_size' not in change:
        config.batch_size = 64
    with pytest.raises(errors.UserError, match=message) as caught:
        tasks[config.task](config, str(tmp_path))
    assert '\n' not in str(caught.value)


def test_tasks_reject_missing_or_different_labels(pretrained: str, monkeypatch, tmp_path) -> None:
    images = sources.open_source('digits/test')
    without = sources.ArraySource(images.images, images.labels, ())
    fewer = sources.ArraySource(images.images, images.labels, images.classes[:-2])
    real = sources.open_source
    for source, message in (
        (without, r'eval\.test has no labels'),
        (
            fewer,
            r'10 classes and config\.eval\.test 8; expected the same classes, but 8, 9 are only',
        ),
    ):
        monkeypatch.setattr(
            sources,
            'open_source',
            lambda spec, *arguments, source=source: source if spec == 'other' else real(spec),
        )
        config = load('linear', init_from=pretrained)
        config.eval.test = 'other'
        with pytest.raises(errors.UserError, match=message):
            supervised.run(config, str(tmp_path))


def test_finetuning_of_few_steps_says_what_to_set(capsys) -> None:
    config = load('finetune:10pct', init_from='none')
    supervised._warn_of_few_steps(config, IndexSampler(0, 165, 128))
    told = capsys.readouterr().err
    assert '165 images give 20 steps of fine-tuning' in told
    assert '--config.batch_size=64 --config.epochs=250 ' in told
    supervised._warn_of_few_steps(config, IndexSampler(0, 13_000, 256))
    assert not capsys.readouterr().err
