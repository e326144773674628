"""Tests of data/holdout.py and of config.eval.split from the command line's keys to the images."""

import pathlib

import jax
import numpy as np
import pytest
from configurations import load
from PIL import Image

from simsiam_jax import errors
from simsiam_jax.checkpoints import encoder, weight_files
from simsiam_jax.data import holdout, sources
from simsiam_jax.models import resnet
from simsiam_jax.tasks import eval_setup, pretrain_setup


def test_images_keep_their_part_when_others_come_and_go() -> None:
    names = [f'{c}/{i}.png' for c in 'ab' for i in range(300)]
    labels = np.repeat([0, 1], 300)
    held = holdout.choose(names, labels, 'ab', 0.2)
    for label in (0, 1):
        assert held[labels == label].mean() == pytest.approx(0.2, abs=0.06)
    assert (
        holdout.choose(names[:450:2], labels[:450:2], 'ab', 0.2).tolist() == held[:450:2].tolist()
    )
    more = [*names, *(f'b/new{i}.png' for i in range(100))]
    grown = holdout.choose(more, np.append(labels, [1] * 100), 'ab', 0.2)
    assert grown[:600].tolist() == held.tolist()


def test_every_class_has_both_parts_except_single_images(capsys: pytest.CaptureFixture) -> None:
    classes = [f'c{i}' for i in range(41)]
    labels = np.append(np.repeat(np.arange(40), 3), 40)
    held = holdout.choose([f'{i}.png' for i in range(121)], labels, classes, 0.01)
    counts = [held[labels == label].sum() for label in range(41)]
    assert counts == [1] * 40 + [0]
    assert '1 classes have a single image (c40): it is trained on' in capsys.readouterr().err
    with pytest.raises(errors.UserError, match=r'hold out is 1\.0; expected above 0 and below 1'):
        holdout.choose(['a'], np.zeros(1, int), ['a'], 1.0)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    for name in ('left', 'right'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
    return f'folder:{tmp_path}/images'


def test_parts_are_disjoint_and_complete(folder: str) -> None:
    whole, train, test = (
        sources.open_source(spec)
        for spec in (folder, f'split:0.3/train:{folder}', f'split:0.3/test:{folder}')
    )
    assert sorted(train.paths + test.paths) == whole.paths
    assert train.classes == test.classes == whole.classes
    assert sources.fingerprint(train)['digest'] != sources.fingerprint(whole)['digest']
    digits = [sources.open_source(f'split:0.3/{part}:digits') for part in ('train', 'test')]
    assert sum(map(len, digits)) == 1797
    with pytest.raises(errors.UserError, match='source is '):
        sources.open_source(f'split:2/train:{folder}')


def test_split_holds_images_out_of_pretraining(folder: str) -> None:
    config = load('folder')
    config.data.source = folder
    config.eval.split = 0.3
    config.batch_size, config.augment.size = 16, 12
    config.model.update(name='resnet18', width_multiplier=0.0625, stages=(1,), stem='cifar')
    setup = pretrain_setup.build(config)
    assert setup.knn is not None
    tested = sources.open_source(f'split:0.3/test:{folder}')
    assert len(setup.source) == 80 - len(tested)
    assert config.data.source == config.eval.train == f'split:0.3/train:{folder}'
    assert config.eval.resize == 12
    again = pretrain_setup.build(config)  # a resolved configuration stays as it is
    assert len(again.source) == len(setup.source)
    config.eval.train = folder
    with pytest.raises(errors.UserError, match='Set one of the two'):
        pretrain_setup.build(config)


def test_evaluation_takes_split_of_one_folder(
    folder: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = resnet.make('resnet18', stages=(1,), width_multiplier=0.0625)
    init = backbone.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    weight_files.write(str(tmp_path / 'x.msgpack'), jax.tree.map(np.asarray, init))
    config = load('knn', init_from=str(tmp_path / 'x.msgpack'))
    config.eval.train, config.eval.split = folder, 0.3
    setup = eval_setup.prepare(config)
    assert len(setup.train) + len(setup.test) == 80
    assert setup.config.eval.test == f'split:0.3/test:{folder}'
    assert 'unlabeled' not in capsys.readouterr().out
    # A run on the whole folder has seen the test images.
    opened = encoder.open_encoder(tmp_path / 'x.msgpack')
    opened.config['data']['source'] = folder
    opened.config['eval'].update(train='', test='')
    monkeypatch.setattr(encoder, 'open_encoder', lambda path: opened)
    config = load('knn', init_from=str(tmp_path / 'x.msgpack'))
    config.eval.split = 0.3
    assert len(eval_setup.prepare(config).test) == len(setup.test)
    assert f'a part of {folder}, which pre-training saw unlabeled' in capsys.readouterr().out
    # A run that held images out decides which.
    parts = {part: f'split:0.3/{part}:{folder}' for part in ('train', 'test')}
    opened.config['eval'].update(parts, split=0.3)
    config = load('knn', init_from=str(tmp_path / 'x.msgpack'))
    config.eval.split = 0.3
    assert eval_setup.prepare(config).config.eval.test == parts['test']
    config = load('knn', init_from=str(tmp_path / 'x.msgpack'))
    config.eval.split = 0.2
    with pytest.raises(errors.UserError, match=r'split is 0\.2, but .* was trained with 0\.3'):
        eval_setup.prepare(config)
