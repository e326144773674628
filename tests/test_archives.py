"""Tests of data/archives.py and data/parquet_source.py: images read without unpacking."""

import concurrent.futures
import io
import json
import pathlib
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Commands
from configurations import load
from PIL import Image

from simsiam_jax import errors
from simsiam_jax.data import archives, listing, parquet_source
from simsiam_jax.data.decode import decode
from simsiam_jax.data.patterns import Patterns
from simsiam_jax.data.sources import fingerprint, open_source
from simsiam_jax.tasks import inputs
from simsiam_jax.tools.doctor import context, image_checks

KINDS = ('stored.zip', 'deflated.zip', 'plain.tar', 'pax.tar')


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new('RGB', (4, 4), (value, 0, 0)).save(buffer, 'PNG')
    return buffer.getvalue()


def pack(path: pathlib.Path, files: dict[str, bytes]) -> str:
    """Writes an archive of the kind that the name says, and returns its source."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == '.zip':
        method = zipfile.ZIP_DEFLATED if 'deflated' in path.name else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, 'w', method) as archive:
            archive.mkdir('empty')
            for name, content in files.items():
                archive.writestr(name, content)
        return f'zip:{path}'
    form = tarfile.PAX_FORMAT if 'pax' in path.name else tarfile.GNU_FORMAT
    with tarfile.open(path, 'w', format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return f'tar:{path}'


def values(source) -> list[int]:
    """Red of the first pixel of each image."""
    return [int(decode(source.read(i)[0], 3)[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize('kind', KINDS)
def test_archive_equals_its_folder(
    kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    long = 'n' * 120  # tar stores names above 100 characters otherwise
    names = [f'cat/{long}.png', 'cat/1.png', 'dog/ä.png', 'dog/x/3.png']
    images = {name: png(i) for i, name in enumerate(names)}
    for name, content in images.items():
        (tmp_path / 'folder' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'folder' / name).write_bytes(content)
    folder = open_source(f'folder:{tmp_path}/folder')
    others = {'__MACOSX/cat/._1.png': b'', 'cat/.2.png': b'', 'cat/notes.txt': b''}
    spec = pack(tmp_path / kind, images | others)
    source = open_source(spec)
    assert source.names() == folder.names()
    assert source.classes == folder.classes == ('cat', 'dog')
    assert [source.read(i) for i in range(4)] == [folder.read(i) for i in range(4)]
    assert fingerprint(source) == fingerprint(folder)
    assert source.name(0) == f'{tmp_path}/{kind}/cat/1.png'
    warning = capsys.readouterr().err
    assert f'archive {tmp_path}/{kind}: skipped 1 .txt' in warning
    assert 'hidden images (1)' in warning
    parts = [
        [open_source(f'split:0.4/{p}:{s}') for p in ('train', 'test')]
        for s in (spec, f'folder:{tmp_path}/folder')
    ]
    for archived, plain in zip(*parts, strict=True):
        assert archived.names() == plain.names()
        assert [archived.read(i) for i in range(len(archived))] == [
            plain.read(i) for i in range(len(plain))
        ]
    selected = open_source(spec, '', Patterns(exclude='cat'))
    assert values(selected) == [3, 2]


@pytest.mark.parametrize('kind', KINDS)
def test_archive_is_read_by_many_threads(kind: str, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    images = {f'{i:03}.npy': rng.bytes(int(rng.integers(1, 9999))) for i in range(100)}
    source = open_source(pack(tmp_path / kind, images))
    order = np.tile(rng.permutation(100), 20)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        read = list(threads.map(lambda i: source.read(int(i))[0], order))
    assert read == [images[f'{i:03}.npy'] for i in order]


def test_classes_of_an_archive_are_below_its_single_folder(tmp_path: pathlib.Path) -> None:
    for form in ('set/{}/1.png', './set/{}/1.png', '/set/{}/1.png', 'set\\{}\\1.png'):
        spec = pack(tmp_path / 'a.zip', {form.format(c): png(i) for i, c in enumerate('ab')})
        source = open_source(spec)
        assert (source.classes, values(source)) == (('a', 'b'), [0, 1])


def shards(root: pathlib.Path) -> str:
    for shard in range(3):
        files = {}
        for i in range(2):
            key, value = f'{shard}_{i}', 2 * shard + i
            files |= {f'{key}.png': png(value), f'{key}.cls': f'{10 - value}\n'.encode()}
            files[f'{key}.json'] = b'{}'
        pack(root / f'train-{shard:03}.tar', files)
    return f'tar:{root}/train-{{000..002}}.tar'


def test_shards_of_webdataset_have_labels(tmp_path: pathlib.Path) -> None:
    spec = shards(tmp_path / 'here')
    source = open_source(spec)
    assert values(source) == list(range(6))
    assert source.labels == [10, 9, 8, 7, 6, 5]  # of the files, whatever classes others have
    assert source.classes == tuple(map(str, range(11)))
    assert source.names()[0] == 'train-000.tar/0_0.png'
    some = open_source(f'tar:{tmp_path}/here/train-00[12].tar')
    assert (some.labels, len(some.classes)) == ([8, 7, 6, 5], 9)
    before = fingerprint(source)
    (tmp_path / 'here').rename(tmp_path / 'moved')
    assert fingerprint(open_source(spec.replace('/here/', '/moved/'))) == before
    with pytest.raises(errors.UserError, match=r'train-003\.tar does not exist'):
        open_source(f'tar:{tmp_path}/moved/train-{{000..003}}.tar')


def test_tar_with_links_and_appended_versions_is_read(tmp_path: pathlib.Path) -> None:
    spec = pack(tmp_path / 'a.tar', {'a.png': png(1), 'b.png': png(2)})
    with tarfile.open(tmp_path / 'a.tar', 'a') as archive:
        link = tarfile.TarInfo('c.png')
        link.type, link.linkname = tarfile.LNKTYPE, 'b.png'
        archive.addfile(link)
        newer = tarfile.TarInfo('a.png')
        newer.size = len(png(3))
        archive.addfile(newer, io.BytesIO(png(3)))
    source = open_source(spec)
    assert dict(zip(source.names(), values(source), strict=True)) == {
        'a.png': 3,
        'b.png': 2,
        'c.png': 2,
    }


def test_labels_of_shards_may_be_text_but_not_missing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    files = {'0.png': png(0), '0.cls': b'dog', '1.jpg': png(1), '1.cls': b'cat\n'}
    for kind in ('a.zip', 'a.tar'):
        source = open_source(pack(tmp_path / kind, files))
        assert (source.classes, source.labels) == (('cat', 'dog'), [1, 0])
    del files['1.cls']
    assert open_source(pack(tmp_path / 'b.tar', files)).classes == ()
    assert 'b.tar has images without a label, so the images have no cl' in capsys.readouterr().err


def test_archive_of_a_dataset_names_its_parts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    files = {f'set/{part}/{c}/0.png': png(0) for part in ('train', 'test') for c in 'ab'}
    open_source(pack(tmp_path / 'a.zip', files))
    warning = capsys.readouterr().err
    assert 'Unpack it to DIR and set config.data.source' in warning
    assert 'config.eval.test to folder:DIR/set/test' in warning


def test_index_of_large_tar_is_cached_until_a_change(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 2)
    spec = pack(tmp_path / 'a.tar', {f'{i}.png': png(i) for i in range(3)})
    assert values(open_source(spec)) == [0, 1, 2]
    with monkeypatch.context() as patched:
        patched.setattr(archives, '_index', None)
        assert values(open_source(spec)) == [0, 1, 2]
    (cache,) = (tmp_path / 'cache/simsiam_jax/listings').iterdir()
    cache.write_text('damaged')
    assert values(open_source(spec)) == [0, 1, 2]
    pack(tmp_path / 'a.tar', {f'{i}.png': png(9 - i) for i in range(4)})
    assert values(open_source(spec)) == [9, 8, 7, 6]


def encrypted(path: pathlib.Path) -> str:
    spec = pack(path, {'a.png': png(1)})
    content = bytearray(path.read_bytes())
    for signature, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        content[content.rindex(signature) + at] |= 1
    path.write_bytes(content)
    return spec


def test_damaged_images_of_archives_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match='encrypted'):
        open_source(encrypted(tmp_path / 'a.zip')).read(0)
    spec = pack(tmp_path / 'b.zip', {'a.png': png(1)})
    content = bytearray((tmp_path / 'b.zip').read_bytes())
    content[content.index(b'\x89PNG') + 20] ^= 1
    (tmp_path / 'b.zip').write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match='Bad CRC'):
        open_source(spec).read(0)
    source = open_source(pack(tmp_path / 'c.tar', {'a.png': png(1)}))
    (tmp_path / 'c.tar').write_bytes((tmp_path / 'c.tar').read_bytes()[:520])
    with pytest.raises(ValueError, match=r'c\.tar is truncated'):
        source.read(0)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.tar.gz', b'\x1f\x8b\x08', r'Decompress it once: gunzip /.*a\.tar\.gz'),
        ('a.tar.zst', b'\x28\xb5\x2f\xfd', r'Decompress it once: unzstd /'),
        ('a.tar', b'text', r'archive /.*a\.tar cannot be read: .*; expected a zip or tar file'),
        ('a.zip', b'PK\x03\x04', r'archive /.*a\.zip cannot be read'),
    ],
)
def test_archive_that_cannot_be_read_says_what_to_do(
    name: str, content: bytes, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=message) as raised:
        open_source(f'tar:{tmp_path}/{name}')
    assert '\n' not in str(raised.value)


def test_archive_without_images_or_on_a_bucket_says_what_to_do(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r'contains no images; .* unpack it once'):
        open_source(pack(tmp_path / 'a.tar', {'b.tar': b''}))
    with pytest.raises(errors.UserError, match=r'gs://b/a\.tar is not on a disk; .* Copy it'):
        open_source('tar:gs://b/a.tar')
    with pytest.raises(errors.UserError, match=r'no file matches /.*/\*\.zip; expected at least'):
        open_source(f'zip:{tmp_path}/*.zip')


FEATURES = {'img': {'_type': 'Image'}, 'fine': {'_type': 'ClassLabel', 'names': ['b', 'a']}}


def write_parquet(root: pathlib.Path, *, named: bool = True, label: str = 'fine') -> str:
    """Two files of five images in groups of two rows, as Hugging Face's datasets write them."""
    root.mkdir()
    for file in range(2):
        rows = range(5 * file, 5 * file + 5)
        images = [{'bytes': png(i), 'path': f'{i}.png' if named else None} for i in rows]
        kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
        columns = {'img': pa.array(images, kind), label: [i % 2 for i in rows]}
        table = pa.table(columns)
        metadata = {'huggingface': json.dumps({'info': {'features': FEATURES}})}
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, root / f'train-{file}-of-2.parquet', row_group_size=2)
    return f'parquet:{root}/train-*.parquet'


def test_parquet_of_hugging_face_is_read_by_index(tmp_path: pathlib.Path) -> None:
    spec = write_parquet(tmp_path / 'x')
    source = open_source(spec)
    assert source.classes == ('b', 'a')
    assert source.labels == [i % 2 for i in range(10)]
    order = np.random.default_rng(0).permutation(np.tile(np.arange(10), 30))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: source.read(int(i)), order))
    assert read == [(png(i), i % 2) for i in order]
    assert source.names() == [f'{i}.png' for i in range(10)]
    train, test = (open_source(f'split:0.3/{part}:{spec}') for part in ('train', 'test'))
    assert sorted(values(train) + values(test)) == list(range(10))
    assert len(open_source(spec, '', Patterns(include='[0-2].png'))) == 3
    before = fingerprint(source)
    (tmp_path / 'x').rename(tmp_path / 'y')
    assert fingerprint(open_source(spec.replace('/x/', '/y/'))) == before
    assert fingerprint(train) != before


def test_parquet_without_stored_names_is_named_by_file_and_row(tmp_path: pathlib.Path) -> None:
    source = open_source(write_parquet(tmp_path / 'x', named=False))
    assert source.name(6) == 'train-1-of-2.parquet:1'
    write_parquet(tmp_path / 'y', named=False)
    other = pq.read_table(tmp_path / 'y/train-0-of-2.parquet').slice(1)
    pq.write_table(other, tmp_path / 'y/train-0-of-2.parquet', row_group_size=2)
    less = open_source(f'parquet:{tmp_path}/y/train-*.parquet')
    assert fingerprint(less) != fingerprint(source)


def test_parquet_keeps_groups_in_memory_up_to_a_limit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec = write_parquet(tmp_path / 'x')
    source = open_source(spec)
    values(source), values(source)
    assert source.column._group.cache_info().misses == 6
    monkeypatch.setattr(parquet_source, '_MEMORY', 1)
    monkeypatch.setattr(parquet_source, '_SLOW', 1)
    source = open_source(spec)
    values(source), values(source)
    assert source.column._group.cache_info()[1:4] == (12, 1, 1)  # misses, limit, kept
    assert 'Write them again with small groups' in capsys.readouterr().err


def test_parquet_of_plain_bytes_and_chosen_columns(tmp_path: pathlib.Path) -> None:
    table = pa.table(
        {
            'a': [png(0), png(1)],
            'b': [png(2), png(3)],
            'animal': ['dog', 'cat'],
            'label': [3, None],
        }
    )
    path = tmp_path / 'x.parquet'
    pq.write_table(table, path)
    source = open_source(f'parquet:{path}?image=b&label=animal')
    assert (values(source), source.classes, source.labels) == ([2, 3], ('cat', 'dog'), [1, 0])
    assert open_source(f'parquet:{path}').classes == ()  # an image has no label
    pq.write_table(table.append_column('box', [[[1], [2]]]), tmp_path / 'y.parquet')
    with pytest.raises(errors.UserError, match=r'has a label \[1\]; expected integers or text'):
        open_source(f'parquet:{tmp_path}/y.parquet?label=box')
    with pytest.raises(errors.UserError, match="no column 'x'; expected one of a, b, animal, lab"):
        open_source(f'parquet:{path}?label=x')
    with pytest.raises(errors.UserError, match='no column of encoded images; its columns are a, b'):
        open_source(f'parquet:{path}?image=animal')


def test_parquet_that_cannot_be_read_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    with pytest.raises(errors.UserError, match=r'cannot be read: .*; expected Parquet') as raised:
        open_source(f'parquet:{tmp_path}/x.parquet')
    assert '\n' not in str(raised.value)
    pq.write_table(pa.table({'image': pa.array([None], pa.binary())}), tmp_path / 'y.parquet')
    with pytest.raises(ValueError, match='the row has no bytes'):
        open_source(f'parquet:{tmp_path}/y.parquet').read(0)


def test_integers_beyond_the_named_classes_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'x.parquet'
    table = pa.table({'img': [png(0)], 'fine': [2]})
    metadata = {'huggingface': json.dumps({'info': {'features': FEATURES}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(errors.UserError, match='has a label 2; expected 0 to 1, as it names 2 cl'):
        open_source(f'parquet:{path}')


def test_run_on_part_of_an_archive_resumes_from_its_folder(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(0)
    files = {}
    for i in range(32):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(buffer, 'PNG')
        files |= {f'{"ab"[i % 2]}/{i}.png': buffer.getvalue(), f'{"ab"[i % 2]}/{i}_mask.png': b''}
    spec = pack(tmp_path / 'a.zip', files)
    with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
        archive.extractall(tmp_path / 'unpacked')

    def run(source: str) -> str:
        done = command(
            'simsiam_jax.main',
            '--config=configs/quickstart.py',
            f'--workdir={tmp_path / "run"}',
            f'--config.data.source={source}',
            '--config.data.exclude=*_mask.*',
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
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run(spec)
    output = run(f'folder:{tmp_path}/unpacked')
    assert 'the 32 images have the same names' in output
    assert 'resuming from step 2' in output


@pytest.mark.parametrize('kind', ['zip', 'tar', 'parquet'])
def test_images_of_archives_reach_the_run_and_the_doctor(kind: str, tmp_path: pathlib.Path) -> None:
    if kind == 'parquet':
        spec = write_parquet(tmp_path / 'x')
    else:
        images = {f'{"ab"[i % 2]}/{i}.png': png(i) for i in range(10)}
        spec = pack(tmp_path / f'a.{kind}', images)
    config = load('folder', data__source=spec)
    images = inputs.open_source(spec, config.data)
    assert sorted(images.images[:, 0, 0, 0].tolist()) == list(range(10))
    assert sorted(images.labels.tolist()) == [0] * 5 + [1] * 5
    found = image_checks._classes(context.Context(config, source=open_source(spec)).source)
    assert [f.text for f in found] == ['2 classes from a (5) to a (5) images'] or kind == 'parquet'
