"""Tests of checkpoints/same_run.py and sources.fingerprint: what may change when a run resumes."""

import pathlib

import numpy as np
import pytest
from commands import Commands
from configurations import load
from etils import epath
from PIL import Image

from simsiam_jax import migration
from simsiam_jax.checkpoints import same_run
from simsiam_jax.checkpoints.same_run import RunIdentity
from simsiam_jax.data import sources, subset

WORKDIR = epath.Path('/runs/old')
IMAGES = {'count': 1437, 'digest': 'ab'}


def identity(images: dict | None = None, **changes) -> RunIdentity:
    config = migration.complete(load('quickstart', **changes).to_dict())
    return RunIdentity(config, IMAGES if images is None else images)


@pytest.mark.parametrize(
    'change',
    [
        {'log__wandb': 'project'},
        {'guard': 'stop'},
        {'checkpoint__max_to_keep': 9},
        {'eval__every_epochs': 1},
        {'eval__train': 'folder:elsewhere'},
        {'data__max_bad_fraction': 0.5},
        {'data__on_device': 'all'},
        {'data__canvas': 64},
        {'data__backend': 'host'},
        {'data__resident_limit': 0},
        {'profile': '10:13'},
        {'model__remat': True},
    ],
)
def test_keys_outside_images_and_mathematics_may_change(change: dict) -> None:
    assert same_run.refusal(WORKDIR, identity(**change), identity()) == ''


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        ({'batch_size': 64}, 'batch_size (128 -> 64)'),
        ({'optim__learning_rate': 0.1}, 'optim.learning_rate (0.8 -> 0.1)'),
        ({'augment__flip': 0.5}, 'augment.flip (0.0 -> 0.5)'),
        ({'seed': 1}, 'seed (0 -> 1)'),
    ],
)
def test_keys_that_change_learning_are_refused(change: dict, name: str) -> None:
    text = same_run.refusal(WORKDIR, identity(**change), identity())
    assert f'/runs/old contains a run with a different configuration: {name}. Revert' in text


def test_epochs_are_refused_with_the_way_to_train_longer() -> None:
    text = same_run.refusal(WORKDIR, identity(epochs=400), identity())
    assert 'epochs (200 -> 400)' in text
    assert '--config.init_from=/runs/old' in text


def test_source_may_move_if_its_images_are_the_same() -> None:
    moved = {'data__source': 'folder:/scratch/7', 'data__exclude': '*.ico'}
    given, stored = identity(**moved), identity()
    assert same_run.refusal(WORKDIR, given, stored) == ''
    (note,) = same_run.notes(given, stored)
    assert 'data.source' in note
    assert '1,437 images' in note


@pytest.mark.parametrize(
    ('images', 'reason'),
    [
        ({'count': 1437, 'digest': 'cd'}, 'Its images differ'),
        ({}, 'It has no digest of its images'),
    ],
)
def test_source_may_not_move_to_other_images(images: dict, reason: str) -> None:
    text = same_run.refusal(WORKDIR, identity(data__source='folder:x'), identity(images))
    assert reason in text


@pytest.mark.parametrize(
    ('now', 'what'),
    [
        ({'count': 1438, 'digest': 'cd'}, '1,437 images, now there are 1,438: '),
        ({'count': 1437, 'digest': 'cd'}, '1,437 images, of which some have other names now: '),
    ],
)
def test_changed_images_are_refused_unless_accepted(now: dict, what: str) -> None:
    text = same_run.refusal(WORKDIR, identity(now), identity())
    assert text.startswith(f'/runs/old was trained on {what}')
    assert '--config.data.accept_changed=True' in text
    accepted = identity(now, data__accept_changed=True)
    assert same_run.refusal(WORKDIR, accepted, identity()) == ''
    (note,) = same_run.notes(accepted, identity())
    assert note.startswith(f'the images have changed (1,437 -> {now["count"]:,})')
    # Runs of versions without a digest resume as before.
    assert same_run.refusal(WORKDIR, identity(now), identity({})) == ''


def test_change_of_rounding_is_noted() -> None:
    (note,) = same_run.notes(identity(data__on_device='all'), identity())
    assert 'rounded differently' in note


def write_images(folder: pathlib.Path, names: list[str]) -> str:
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return f'folder:{folder}'


def test_fingerprint_depends_on_names_but_not_on_the_root(tmp_path: pathlib.Path) -> None:
    names = ['a/1.png', 'a/2.png', 'b/1.png']
    here, there, other = (
        sources.fingerprint(sources.open_source(write_images(tmp_path / root, files)))
        for root, files in (('x', names), ('y/z', names), ('w', [*names[:2], 'c/1.png']))
    )
    assert here == there
    assert here['count'] == other['count'] == 3
    assert here['digest'] != other['digest']


def test_names_of_images_have_nothing_of_the_digest(tmp_path: pathlib.Path) -> None:
    names = ['a/1.png', 'a/2.png', 'b/1.png']
    source = sources.open_source(write_images(tmp_path, names))
    assert sources.image_names(source) == names
    assert sources.image_names(subset.Subset(source, np.array([0, 2]))) == names
    joined = sources.open_source(f'folder:{tmp_path}/a+folder:{tmp_path}/b')
    assert sources.image_names(joined) == ['1.png', '2.png', '1.png']
    assert sources.image_names(sources.open_source('digits/train')) == []


def test_run_resumes_from_a_moved_folder(command: Commands, tmp_path: pathlib.Path) -> None:
    names = [f'{i}.png' for i in range(32)]
    write_images(tmp_path / 'before', names)

    def run(folder: str) -> tuple[int, str]:
        done = command(
            'simsiam_jax.main',
            '--config=configs/quickstart.py',
            f'--workdir={tmp_path / "run"}',
            f'--config.data.source=folder:{tmp_path / folder}',
            '--config.eval.train=',
            '--config.eval.test=',
            '--config.batch_size=16',
            '--config.epochs=1',
            '--config.model.stages=(1,)',
            '--config.model.width_multiplier=0.125',
            '--config.guard=off',
            '--config.log.report=False',
            '--config.log.tensorboard=False',
        )
        return done.returncode, done.stdout + done.stderr

    code, output = run('before')
    assert code == 0, output
    (tmp_path / 'before').rename(tmp_path / 'after')
    code, output = run('after')
    assert code == 0, output
    assert 'the 32 images have the same names' in output
    assert 'resuming from step 2' in output
    (tmp_path / 'after' / '0.png').rename(tmp_path / 'after' / 'other.png')
    (tmp_path / 'after').rename(tmp_path / 'again')
    code, output = run('again')
    assert code == 1
    assert 'Its images differ (added: other.png; removed: 0.png). Revert' in output
    for name in names[1:6]:
        (tmp_path / 'again' / name).unlink()
    (tmp_path / 'again').rename(tmp_path / 'before')
    code, output = run('before')
    assert code == 1
    assert 'was trained on 32 images, now there are 27 (added: other.png; removed: ' in output
    assert '0.png, 1.png, 2.png and 3 more): their order' in output
