"""Tests of configs/, config.py and tasks/pretrain_setup.py: all configurations build and step."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from configurations import CONFIGS, load
from PIL import Image

from simsiam_jax import config_files, config_keys, errors, method_defaults
from simsiam_jax.data import files, sources
from simsiam_jax.tasks import features, pretrain_setup, summary
from simsiam_jax.training import step

EVALUATIONS = ['linear', 'linear:sgd', 'linear:sweep', 'linear:cached', 'finetune']
EVALUATIONS += ['finetune:10pct', 'finetune:1pct', 'knn']
ABLATIONS = ['ablations']  # tests/test_ablations.py
COMPARED = ['simclr', 'moco_v2', 'byol', 'swav']
VARIANTS = [
    *['imagenet', 'imagenet:200ep', 'cifar10', 'folder', 'quickstart'],
    *(f'{file}:{method}' for file in ('imagenet', 'cifar10', 'quickstart') for method in COMPARED),
]


def test_config_files_are_all_listed() -> None:
    names = {name.split(':')[0] for name in VARIANTS + EVALUATIONS + ABLATIONS}
    assert {path.stem for path in CONFIGS.glob('*.py')} == names


@pytest.fixture
def _no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Sources that are not on this machine, as one small file many times."""
    image = str(tmp_path / 'image.png')
    Image.new('RGB', (4, 4), (255, 0, 51)).save(image)

    real = sources.open_source

    def unread(spec: str, *arguments: object):
        if spec.startswith('digits'):
            return real(spec)
        return files.FileSource([image] * 4096, [i % 2 for i in range(4096)], ('a', 'b'))

    monkeypatch.setattr(sources, 'open_source', unread)


def _long_if_alike(names: list[str]) -> list[Any]:
    """Marks those as long whose programs differ only in sizes from others'."""
    return [
        pytest.param(n, marks=pytest.mark.long if n.startswith(('cifar10:', 'imagenet:2')) else [])
        for n in names
    ]


@pytest.mark.usefixtures('_no_files')
@pytest.mark.parametrize('name', _long_if_alike(VARIANTS))
def test_config_builds_and_steps(name: str) -> None:
    config = load(name)
    if ':' in name or name == 'folder':  # the whole network is built under the file's own name
        config.model.stages = (1,)
    parts = pretrain_setup.build(config)
    views = [
        jax.ShapeDtypeStruct(
            (config.batch_size, recipe.size, recipe.size, config.data.channels), np.float32
        )
        for recipe in parts.recipes
    ]
    train_step = step.make_train_step(parts.method, parts.tx, parts.mesh)
    before = jax.eval_shape(parts.init)
    after, metrics = jax.eval_shape(train_step, before, views)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert {'loss', 'z_std'} <= set(metrics)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves((after.params, metrics)))


@pytest.mark.parametrize('name', EVALUATIONS)
def test_check_refuses_unknown_key_of_evaluation(name: str) -> None:
    config = load(name)
    config_keys.check(config)
    with config.unlocked():
        config.eval.topk = 5
    with pytest.raises(errors.UserError, match=r'unknown key config\.eval\.topk'):
        config_keys.check(config)


def test_linear_config_follows_paper_and_official_code() -> None:
    lars, sgd = load('linear'), load('linear:sgd')
    assert (lars.optim.name, lars.optim.learning_rates, lars.batch_size) == ('lars', (0.1,), 4096)
    assert (sgd.optim.name, sgd.optim.learning_rates, sgd.batch_size) == ('sgd', (30.0,), 256)
    for config in (lars, sgd):
        assert (config.epochs, config.optim.weight_decays) == (90, (0.0,))
        assert (config.augment.crop_scale, config.augment.flip) == ((0.08, 1.0), 0.5)
        assert config.augment.jitter == config.augment.blur == config.augment.gray == 0
    with pytest.raises(errors.UserError, match=r"no variant 'adam'; known: lars, sgd"):
        load('linear:adam')


def test_imagenet_config_is_the_baseline_of_the_paper() -> None:
    config = load('imagenet')
    assert (config.model.name, config.augment.size) == ('resnet50', 224)
    assert (config.batch_size, config.epochs, config.optim.learning_rate) == (512, 100, 0.05)
    assert config.optim.predictor_schedule == 'constant'
    assert load('imagenet:200ep').epochs == 200
    folder = load('imagenet:400ep,folder:/data')
    assert folder.epochs == 400
    assert folder.data.source == folder.eval.train == 'folder:/data/train'
    assert folder.eval.test == 'folder:/data/val'


def test_byol_config_has_three_schedules() -> None:
    for epochs, rate, decay, momentum in (
        (100, 0.45, 1e-6, 0.99),
        (200, 0.3, 1e-6, 0.99),
        (400, 0.3, 1e-6, 0.99),
        (800, 0.2, 1.5e-6, 0.996),
    ):
        config = load(f'imagenet:byol,{epochs}ep')
        optim = config.optim
        assert (config.epochs, optim.learning_rate, optim.weight_decay) == (epochs, rate, decay)
        assert config.method.momentum == momentum
        assert method_defaults.other_schedule(config) == ''


def test_byol_with_schedule_for_other_epochs_is_reported(capsys) -> None:
    config = load('quickstart:byol', epochs=800)
    config.update_from_flattened_dict(method_defaults.byol_schedule(100))
    pretrain_setup.build(config)
    assert capsys.readouterr().out == (
        'warning: optim.learning_rate=0.45, optim.weight_decay=1e-06, method.momentum=0.99 is for '
        'another number of epochs than config.epochs=800. Set --config.optim.learning_rate=0.2 '
        '--config.optim.weight_decay=1.5e-06 --config.method.momentum=0.996, or give the epochs as '
        'a word: --config=FILE.py:byol,800ep\n'
    )
    warning = method_defaults.other_schedule(load('imagenet:byol,400ep', epochs=100))
    assert 'Set --config.optim.learning_rate=0.45, or' in warning
    chosen = load('imagenet:byol', epochs=800, optim__learning_rate=0.25)
    for config in (load('imagenet:byol', epochs=150), load('imagenet', epochs=800), chosen):
        assert method_defaults.other_schedule(config) == ''


@pytest.mark.usefixtures('_no_files')
def test_swav_config_has_the_rates_of_the_paper() -> None:
    config = load('imagenet:swav')
    config.model.stages = (1, 1, 1, 1)
    rate = pretrain_setup.build(config).rates['lr']  # an epoch is a step here
    np.testing.assert_allclose(
        [rate(0), rate(10), rate(55), rate(100)], [0.3, 4.8, 2.4024, 0.0048], rtol=1e-5
    )


@pytest.mark.usefixtures('_no_files')
def test_recipes_differ_for_second_view_and_local_crops() -> None:
    config = load('imagenet:byol')
    config.local_crops.number = 2
    first, second, *small = pretrain_setup.build(config).recipes
    assert (first.blur, first.solarize) == (1.0, 0.0)
    assert second == dataclasses.replace(first, blur=0.1, solarize=0.2)
    assert small == [dataclasses.replace(first, size=96, crop_scale=(0.05, 0.14))] * 2


def test_view_grid_shows_local_crops_beside_large_views() -> None:
    config = load('quickstart')
    config.local_crops.update(number=3, size=5, crop_scale=(0.2, 0.5))
    parts = pretrain_setup.build(config)
    picture = summary.view_grid(next(parts.batches(0, 1)), parts.to_views, parts.recipes)
    # 16 images in rows of two; views of 8 and 5 pixels 8-fold, in borders of 2; images in such
    # of 2 above and below and 4 at the sides.
    assert picture.shape == (8 * (64 + 4 + 4), 2 * (2 * (64 + 4) + 3 * (40 + 4) + 8), 3)


@pytest.mark.usefixtures('_no_files')
def test_normalize_auto_measures_mean_and_std() -> None:
    config = load('folder')
    parts = pretrain_setup.build(config)
    assert config.augment.mean == parts.recipes[0].mean == (1.0, 0.0, 0.2)
    assert config.augment.std == (pytest.approx(1 / 255, abs=1e-4),) * 3


def test_config_docstrings_give_command_and_figure() -> None:
    for path in CONFIGS.glob('*.py'):
        text = path.read_text()
        assert f'python -m simsiam_jax.main --config=configs/{path.name}' in text
        assert re.search(r'68\.1 ?%|91\.8 ?%|[Nn]ot (a\s+setting\s+of|from)\s+the\s+paper', text), (
            path
        )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'method.stop_gradiant': True}, r'method\.stop_gradiant.*stop_gradient'),
        ({'optim.learning_rat': 0.1}, r'optim\.learning_rat.*learning_rate'),
        ({'lr': 0.1}, r'config\.lr'),
        ({'method.name': 'simsaim'}, r"'simsaim'.*simsiam"),
        ({'model.name': 'resnet51'}, r"'resnet51'.*resnet50"),
        ({'model.stem': 'imagnet'}, r"'imagnet'.*imagenet"),
        ({'model.dtype': 'float16'}, r"model\.dtype is 'float16'"),
        ({'batch_size': 100}, r'batch_size is 100.*8 devices; use 96 or 104'),
        ({'batch_size': 8000}, r'batch_size is 8000.*only 1437 images'),
        ({'optim.warmup_epochs': 200}, r'warmup_epochs is 200; expected.*below epochs=200'),
        ({'augment.mean': (0.1, 0.2)}, r'augment\.mean has 2 values for images of 1 channel'),
        ({'data.channels': 3}, r'data\.channels is 3.*have 1'),
        ({'data.source': 'folder:/no/such'}, r'/no/such does not exist'),
        ({'eval.test': ''}, r'eval\.test'),
        ({'eval.k': 0}, r'eval\.k is \(0,\)'),
        ({'second_view.blurr': 0.1}, r'second_view\.blurr.*blur'),
        ({'local_crops.sise': 4}, r'local_crops.sise.*size'),
        ({'local_crops.number': -1}, r'local_crops.number is -1'),
        ({'augment.size': 16}, r'images are 8x8.*config\.eval\.resize'),
    ],
)
def test_build_names_wrong_values(change: dict, message: str) -> None:
    config = load('quickstart')
    with config.unlocked():
        config.update_from_flattened_dict(change)

    def start() -> None:
        evaluate = pretrain_setup.build(config).knn
        evaluate(features.raw_pixels, {})  # some errors only appear at the first evaluation

    with pytest.raises(errors.UserError, match=message) as caught:
        start()
    assert '\n' not in str(caught.value)


def test_check_names_missing_key() -> None:
    config = load('quickstart')
    with config.unlocked():
        del config.optim.momentum
    with pytest.raises(errors.UserError, match=r'config\.optim\.momentum is missing'):
        config_keys.check(config)


@pytest.mark.parametrize('file', ['imagenet', 'cifar10', 'folder', 'quickstart'])
def test_variant_words_work_in_every_pretraining_config(file: str) -> None:
    config = load(f'{file}:7ep,byol')
    assert (config.method.name, config.epochs) == ('byol', 7)
    assert config.optim.predictor_schedule == 'decayed'
    config_keys.check(config)
    for word in ('byoll', '0ep', 'folder:'):
        with pytest.raises(
            errors.UserError, match=f"{file}.py has no variant '{word}'; known: 200"
        ):
            load(f'{file}:{word}')


def test_variant_folder_sets_the_images() -> None:
    config = load('cifar10:folder:/data/c,100ep')
    assert (config.data.source, config.eval.train) == ('folder:/data/c/train',) * 2
    assert (config.eval.test, config.method.name) == ('folder:/data/c/test', 'simsiam')
    assert load('folder:folder:/data/c').data.source == 'folder:/data/c'
    config = load('cifar10:npz:/data/c.npz,lightly')
    assert (config.data.source, config.eval.test) == (
        'npz:/data/c.npz/train',
        'npz:/data/c.npz/test',
    )
    assert (config.eval.k, config.optim.predictor_schedule) == (200, 'decayed')
    assert config.augment.mean != load('cifar10').augment.mean
    small = load('cifar10:small,swav')
    assert (small.data.source, small.method.frozen_steps) == ('tfds:cifar10/train[:5000]', 39)
    assert load('cifar10:small,folder:/data/c').data.source == 'folder:/data/c/train'
    with pytest.raises(errors.UserError, match='has lightly or small; got both'):
        load('cifar10:small,lightly')
    with pytest.raises(errors.UserError, match=r"no variant 'lightl'; .*, lightly, small$"):
        load('cifar10:lightl')
    with pytest.raises(errors.UserError, match=r'Use configs/folder\.py:folder:/data/c'):
        load('quickstart:folder:/data/c')


def test_variant_of_config_without_variants_is_refused() -> None:
    with pytest.raises(errors.UserError, match=r"knn\.py has no variants; got 'byol'\. Remove"):
        config_files.load('configs/knn.py:byol')
