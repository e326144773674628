"""Tests of tasks/inputs.py and paths.py: sources on a disk that is away when a run starts."""

import builtins
import errno
import glob
import os
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from simsiam_jax import config as config_lib
from simsiam_jax import errors, paths, patience
from simsiam_jax.data import archives, sources, tfds_source
from simsiam_jax.tasks import inputs

SPECS = (
    'folder:{}/ima*/*',
    'files:{}/list.txt',
    'files:{}/list.csv',
    'zip:{}/a.zip',
    'npz:{}/a.npz',
    'npy:{}/a.npy',
)


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a folder with the same two images in several forms."""
    for name in ('a', 'b'):
        folder = tmp_path / 'images' / name
        folder.mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(folder / '0.png')
    names = ['images/a/0.png', 'images/b/0.png']
    (tmp_path / 'list.txt').write_text('\n'.join(names))
    (tmp_path / 'list.csv').write_text(f'path,label\n{names[0]},a\n{names[1]},b')
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as file:
        for name in names:
            file.write(tmp_path / name, name)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images)
    np.save(tmp_path / 'a.npy', images)
    return tmp_path


def take_away(monkeypatch: pytest.MonkeyPatch, disk: pathlib.Path, calls: int) -> list[int]:
    """Lets the next calls on files below `disk` fail; returns a list of the failed ones' errors."""
    numbers, failed = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT), []

    def failing(function):
        def call(path, *arguments, **options):
            below = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(disk))
            if below and len(failed) < calls:
                failed.append(numbers[len(failed) % 3])
                raise OSError(failed[-1], os.strerror(failed[-1]), path)
            return function(path, *arguments, **options)

        return call

    for module, name in ((os, 'stat'), (os, 'scandir'), (os, 'listdir'), (builtins, 'open')):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    return failed


def data_section(retry_seconds: float):
    data = config_lib.default().data
    data.retry_seconds = retry_seconds
    return data


@pytest.mark.parametrize('form', SPECS)
@pytest.mark.parametrize('calls', [1, 2, 3, 4])
def test_opening_waits_for_storage_that_is_away(form, calls, disk, monkeypatch, capsys) -> None:
    spec = form.format(disk)
    expected = sources.open_source(spec)
    with monkeypatch.context() as patched:
        failed = take_away(patched, disk, calls)
        found = inputs.open_images(spec, data_section(60.0))
        assert len(failed) == calls
    assert sources.fingerprint(found) == sources.fingerprint(expected)
    assert (found.classes, found.name(1)) == (expected.classes, expected.name(1))
    assert 'waiting up to 60 s for the image' in capsys.readouterr().err


@pytest.mark.parametrize('form', SPECS)
def test_opening_gives_up_after_retry_seconds(form, disk, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        take_away(patched, disk, 10_000)
        with pytest.raises(
            errors.TemporaryError, match=r'cannot be used for 0 s now: \w+'
        ) as caught:
            inputs.open_images(form.format(disk), data_section(0.2))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('form', 'message'),
    [
        ('folder:{}/no', r'does not exist or is not a folder'),
        ('folder:{}/no*', r'no image folder matches'),
        ('files:{}/no.txt', r'does not exist or is not a file'),
        ('files:{}', r'does not exist or is not a file'),
        ('zip:{}/no.zip', r'does not exist'),
        ('npz:{}/no.npz', r'does not exist'),
        ('npy:{}/no.npy', r'does not exist'),
        ('parquet:{}/no*.parquet', r'no file matches'),
    ],
)
def test_missing_file_is_not_waited_for(form, message, disk, capsys) -> None:
    with pytest.raises(errors.UserError, match=message) as caught:
        inputs.open_images(form.format(disk), data_section(60.0))
    assert not isinstance(caught.value, errors.TemporaryError)
    assert 'waiting' not in capsys.readouterr().err


def test_damaged_file_is_not_waited_for(disk, capsys) -> None:
    for name in ('a.npz', 'a.npy', 'a.zip'):
        (disk / name).write_bytes((disk / name).read_bytes()[:60])
        with pytest.raises(errors.UserError, match='cannot be read'):
            inputs.open_images(f'{name[2:]}:{disk}/{name}', data_section(60.0))
    assert 'waiting' not in capsys.readouterr().err


def test_dataset_of_tfds_that_is_away_is_opened_again(monkeypatch, tmp_path) -> None:
    folder = tmp_path / 'some' / '1.0.0'
    folder.mkdir(parents=True)
    attempts, opened = [], tfds_source.TfdsSource([], (), 'tfds:some/train')

    def fail_once(spec: str, data_dir: str):
        attempts.append(spec)
        if len(attempts) == 1:  # as if the disk had been away until now
            raise errors.UserError('TFDS knows no dataset some')
        return opened

    monkeypatch.setattr(tfds_source, '_open', fail_once)
    with pytest.raises(errors.UserError, match='knows no dataset'):
        tfds_source.open_split('some/train', str(tmp_path))
    attempts.clear()
    (folder / 'dataset_info.json').touch()
    assert tfds_source.open_split('some/train', str(tmp_path)) is opened
    assert len(attempts) == 2


@pytest.mark.parametrize(
    'pattern', ['*', '*/*', 'a/*', 'a/?.png', 'no/*', '[ab]/0*', '.*', 'a/0.png']
)
def test_matching_finds_what_glob_finds(pattern, tmp_path) -> None:
    for name in ('a/0.png', 'a/1.png', 'b/0.png', 'b/.hidden/2.png', '.c/0.png', 'A/00.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pattern = os.path.join(tmp_path, pattern)
    assert paths.matching(pattern) == sorted(glob.glob(pattern))


def test_matching_raises_if_the_disk_is_away(disk, monkeypatch) -> None:
    take_away(monkeypatch, disk, 1)
    with pytest.raises(OSError, match='Stale file handle'):
        paths.matching(f'{disk}/*')


def test_tar_with_a_zip_file_at_its_end_is_a_tar(disk) -> None:
    import tarfile

    with tarfile.open(disk / 'a.tar', 'w') as file:
        file.add(disk / 'images', 'images')
        file.add(disk / 'a.zip', 'a.zip')
    assert archives.open_archives(f'{disk}/a.tar').names() == ['images/a/0.png', 'images/b/0.png']


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (OSError(errno.ESTALE, 'Stale'), True),
        (OSError(errno.ENOENT, 'missing'), False),
        (OSError(errno.ECONNREFUSED, 'no network'), False),
        (OSError('no number'), False),
        (MemoryError(), False),
    ],
)
def test_outage_is_found_in_a_chain_of_errors(error: Exception, expected: bool) -> None:
    assert (patience.outage(error) is error) == expected
    outer = errors.UserError('cannot be read')
    outer.__cause__ = error
    assert (patience.outage(outer) is error) == expected
    waited = errors.TemporaryError('has been waited for')
    waited.__cause__ = error
    assert patience.outage(waited) is None
