"""Tests of data/files.py and listing.py, and of TFRecord files in data/tfds_source.py."""

import errno
import os
import pathlib
import struct

import jax
import numpy as np
import pytest
from PIL import Image

from simsiam_jax import errors, lazy_tf, paths
from simsiam_jax.data import files, listing, lists, tfds_source
from simsiam_jax.data.decode import decode
from simsiam_jax.data.sources import fingerprint, open_source
from simsiam_jax.pages import page
from simsiam_jax.training import mesh


def save(path: pathlib.Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), (value, 0, 0)).save(path)


def test_open_list_reads_labels_from_csv(tmp_path: pathlib.Path) -> None:
    for i in range(3):
        save(tmp_path / 'images' / f'{i}.png', i)
    lines = ['path,label', 'images/2.png,dog', '"images/0.png", cat', 'images/1.png,dog']
    (tmp_path / 'list.csv').write_text('\n'.join(lines))
    source = open_source(f'files:{tmp_path}/list.csv')
    assert source.classes == ('cat', 'dog')
    assert [source.read(i)[1] for i in range(3)] == [1, 0, 1]
    assert [decode(source.read(i)[0], 3)[0, 0, 0] for i in range(3)] == [2, 0, 1]
    headed = ['file name,kind', 'images/2.png,dog', 'images/0.png,cat']
    (tmp_path / 'headed.csv').write_text('\n'.join(headed))
    assert open_source(f'files:{tmp_path}/headed.csv').classes == ('cat', 'dog')
    (tmp_path / 'bare.csv').write_text('images/0.png\nimages/1.png\n')
    assert open_source(f'files:{tmp_path}/bare.csv').classes == ()
    (tmp_path / 'uneven.csv').write_text('images/0.png,cat\nimages/1.png\n')
    with pytest.raises(
        errors.UserError,
        match=r"line 2 has 1 fields; expected 2, as in its first line 'images/0.png,cat'",
    ):
        open_source(f'files:{tmp_path}/uneven.csv')


@pytest.mark.parametrize(
    ('spec', 'name'),
    [
        ('folder:~/images', 'images/0.png'),
        ('split:0.5/train:folder:~/images', 'images/'),
        ('files:~/list.txt', 'images/1.png'),
        ('npz:~/a.npz', 'a.npz[images][0]'),
        ('npy:~/a.npy,~/labels.npy', 'a.npy[0]'),
    ],
)
def test_sources_begin_in_the_home_folder(
    spec: str, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        save(tmp_path / 'images' / f'{i}.png', i)
    (tmp_path / 'list.txt').write_text('images/1.png\n')
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images, labels=np.zeros(2, int))
    np.save(tmp_path / 'a.npy', images)
    np.save(tmp_path / 'labels.npy', np.zeros(2, int))
    monkeypatch.setenv('HOME', str(tmp_path))
    assert open_source(spec).name(0).startswith(f'{tmp_path}/{name}')


def test_source_without_a_kind_suggests_the_folder_in_the_home(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'images').mkdir()
    with pytest.raises(errors.UserError, match=r'did you mean folder:~/images\?'):
        open_source('~/images')


def test_open_folder_caches_listing_until_a_change(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 3)
    root = tmp_path / 'images'
    for i in range(4):
        save(root / 'a' / f'{i}\n.png', i)  # names may contain newlines
    first = files.open_folder(str(root)).paths
    assert len(first) == 4

    def unexpected(*arguments: object) -> None:
        raise AssertionError('listed again')

    with monkeypatch.context() as patched:
        patched.setattr(listing, '_walk', unexpected)
        assert files.open_folder(str(root)).paths == first
    os.utime(root / 'a', ns=(0, 0))  # clocks are too coarse to show an immediate change
    save(root / 'a' / 'new.png', 9)
    assert len(files.open_folder(str(root)).paths) == 5


def test_names_that_are_not_utf8_are_escaped_for_messages_but_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / os.fsdecode(b'm\xfcnchen')
    for folder in (b'caf\xe9', b'th\xe9'):
        save(root / os.fsdecode(folder) / os.fsdecode(b'\xe9t\xe9.png'), 5)
    (root / 'list.csv').write_bytes(b'caf\xe9/\xe9t\xe9.png,\xe9\n')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 1)
    for source in (files.open_folder(str(root)), lists.open_list(str(root / 'list.csv'))):
        assert source.name(0) == f'{tmp_path}/m\\xfcnchen/caf\\xe9/\\xe9t\\xe9.png'
        assert decode(source.read(0)[0], 3)[0, 0, 0] == 5
        assert fingerprint(source)['count'] == len(source)
    assert source.classes == ('\\xe9',)
    assert files.open_folder(str(root)).classes == ('caf\\xe9', 'th\\xe9')  # from the cache
    assert len(open_source(f'split:0.5/train:folder:{root}').name(0).encode()) > 0
    text = page.page(str(root), {'a': str(root)})
    assert text.encode().count(b'm\\xfcnchen') == 3  # title, heading, text


def test_folders_of_systems_are_skipped_and_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    kept = ['a/0.png', 'a/trash/1.png', 'b/2.png']
    system = ['@eaDir', '.Trash-1000', '__MACOSX', '$RECYCLE.BIN', 'System Volume Information']
    system += ['lost+found', 'Thumbnails', 'a/@eaDir']
    for name in [*kept, *(f'{folder}/x/3.png' for folder in system), 'a/._0.png', 'b/._2.png']:
        save(tmp_path / name, 1)
    source = files.open_folder(str(tmp_path))
    assert source.names() == kept
    assert source.classes == ('a', 'b')
    warning = capsys.readouterr().err
    assert f'image folder {tmp_path}: skipped hidden or of the system: $RECYCLE.BIN (1)' in warning
    assert '@eaDir (2)' in warning
    assert 'hidden images (2)' in warning
    assert all(name in warning for name in system[:7])
    assert warning.count('\n') == 1
    assert len(files.open_folder(str(tmp_path / 'Thumbnails'))) == 1  # named by the user


def test_folders_that_may_not_be_entered_are_skipped_with_a_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 1)
    root = tmp_path / 'images'
    for folder in ('a', 'b', 'private'):
        save(root / folder / '0.png', 1)
    (root / 'circle').symlink_to(root / 'circle')
    scandir, refused = os.scandir, {str(root / 'private')}

    def refusing(folder: str):
        if folder in refused:
            raise PermissionError(13, 'Permission denied', folder)
        return scandir(folder)

    monkeypatch.setattr(os, 'scandir', refusing)
    assert files.open_folder(str(root)).names() == ['a/0.png', 'b/0.png']
    warning = capsys.readouterr().err
    assert 'skipped 2 that may not be entered' in warning
    assert f'{root}/private' in warning
    assert f'{root}/circle' in warning
    refused.clear()  # access does not change a folder's time, so that the listing is not cached
    assert len(files.open_folder(str(root))) == 3
    refused.add(str(root))
    (root / 'new').mkdir()
    with pytest.raises(errors.UserError, match='Permission denied'):
        files.open_folder(str(root))


def test_listing_waits_for_a_disk_that_fails_for_a_moment(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ('a', 'b'):
        save(tmp_path / name / '0.png', 0)
    real, failures = os.scandir, [FileNotFoundError(2, 'missing'), None, OSError(116, 'Stale')]

    def failing(folder: str) -> object:
        if failures and (failure := failures.pop()):
            raise failure
        return real(folder)

    monkeypatch.setattr(os, 'scandir', failing)
    assert len(files.open_folder(str(tmp_path))) == 2
    assert failures == []
    assert f'waiting up to 300 s for the image folder {tmp_path}: Stale' in capsys.readouterr().err
    with pytest.raises(errors.UserError, match='none does not exist or is not a folder'):
        files.open_folder(f'{tmp_path}/none')


def test_listing_needs_no_cache(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(listing, 'LARGE', 1)
    for i in range(2):
        save(tmp_path / 'images' / f'{i}.png', i)
    monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null/cache')  # nobody can write there
    errors.warn_once.cache_clear()  # other tests may have had no cache
    paths._writable.cache_clear()
    assert len(files.open_folder(str(tmp_path / 'images'))) == 2
    assert len(files.open_folder(str(tmp_path / 'images'))) == 2
    warning = capsys.readouterr().err
    assert (
        'continuing without caches, because /dev/null/cache/simsiam_jax cannot be used' in warning
    )
    assert warning.count('\n') == 1
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def full(*arguments: object) -> None:
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(os, 'replace', full)
        assert len(files.open_folder(str(tmp_path / 'images'))) == 2
    assert 'No space left on device' in capsys.readouterr().err
    listings = tmp_path / 'cache' / 'simsiam_jax' / 'listings'
    assert list(listings.iterdir()) == []
    files.open_folder(str(tmp_path / 'images'))
    (cache,) = listings.iterdir()
    cache.write_text('damaged')
    assert len(files.open_folder(str(tmp_path / 'images'))) == 2
    (cache,) = listings.iterdir()
    assert cache.read_text() != 'damaged'


def test_cache_folder_is_none_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as for a user without an entry
    assert paths.cache_folder() is None
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    changed: dict[str, object] = {}
    monkeypatch.setattr(jax.config, 'update', changed.__setitem__)
    mesh.use_compilation_cache()
    assert 'jax_compilation_cache_dir' not in changed
    monkeypatch.undo()


def test_open_source_reads_remote_folders_and_lists() -> None:
    tf = lazy_tf.load()
    for i in range(3):
        tf.io.gfile.makedirs(f'ram://bucket/{i}')
        with tf.io.gfile.GFile(f'ram://bucket/{i}/x.npy', 'wb') as file:
            np.save(file, np.full((2, 2, 1), i, np.uint8))
    for hidden in ('@eaDir/0', '0/.x/y'):
        tf.io.gfile.makedirs(f'ram://bucket/{hidden}')
        tf.io.gfile.GFile(f'ram://bucket/{hidden}/x.npy', 'wb').close()
    source = open_source('folder:ram://bucket')
    assert source.classes == ('0', '1', '2')
    assert [decode(source.read(i)[0], 1)[0, 0, 0] for i in range(3)] == [0, 1, 2]
    with tf.io.gfile.GFile('ram://bucket/list.txt', 'w') as file:
        file.write('2/x.npy\n0/x.npy\n')
    listed = open_source('files:ram://bucket/list.txt')
    assert [decode(listed.read(i)[0], 1)[0, 0, 0] for i in range(2)] == [2, 0]
    with pytest.raises(errors.UserError, match=r'ram://nothing/list\.txt cannot be read'):
        open_source('files:ram://nothing/list.txt')


def test_open_folder_waits_for_storage_that_is_away(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'a.png').write_bytes(b'')
    scan, failures = os.scandir, [OSError(errno.ESTALE, 'Stale file handle')]

    def scan_later(path: str) -> object:
        if failures:
            raise failures.pop()
        return scan(path)

    monkeypatch.setattr(os, 'scandir', scan_later)
    monkeypatch.setattr(os.path, 'isdir', lambda path: not failures)  # False if stat() fails
    assert len(files.open_folder(str(tmp_path))) == 1


def test_tfrecord_source_reads_by_index(tmp_path: pathlib.Path) -> None:
    tf = lazy_tf.load()
    shards = []
    for number, count in enumerate((3, 4)):
        path = str(tmp_path / f'{number}.tfrecord')
        with tf.io.TFRecordWriter(path) as writer:
            for i in range(count):
                value = f'image {number} {i}'.encode() * (i + 1)
                features = {
                    'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])),
                    'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[i])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
        shards.append((path, number, 2))  # records 0, 1 of the first, 1, 2 of the second
    source = tfds_source.TfRecordSource(shards, ('a', 'b', 'c', 'd'), 'tfds:x/train')
    assert [source.read(i) for i in (3, 0, 1, 2)] == [
        (b'image 1 2' * 3, 2),
        (b'image 0 0', 0),
        (b'image 0 1' * 2, 1),
        (b'image 1 1' * 2, 1),
    ]
    with open(shards[0][0], 'r+b') as file:
        file.truncate(os.path.getsize(shards[0][0]) - 5)
    with pytest.raises(errors.UserError, match=r'0\.tfrecord is truncated'):
        tfds_source.TfRecordSource(shards, (), 'tfds:x/train')


def test_index_of_tfrecord_files_is_remembered(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 2)
    path = tmp_path / 'a.tfrecord'
    record = struct.pack('<Q4x', 5) + bytes(5 + 4)
    path.write_bytes(record * 3)
    assert len(tfds_source.TfRecordSource([(str(path), 0, 3)], (), 'tfds:x/train')) == 3
    with monkeypatch.context() as patched:
        patched.setattr(tfds_source, '_offsets', None)
        assert len(tfds_source.TfRecordSource([(str(path), 1, 2)], (), 'tfds:x/train')) == 2
    path.write_bytes(record * 4)
    assert len(tfds_source.TfRecordSource([(str(path), 0, 4)], (), 'tfds:x/train')) == 4
    path.unlink()
    with pytest.raises(errors.UserError, match=r'a\.tfrecord cannot be read: No such file'):
        tfds_source.TfRecordSource([(str(path), 0, 4)], (), 'tfds:x/train')
