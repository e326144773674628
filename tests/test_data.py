"""Tests of data/sampler.py, sources.py, tfds_source.py, host.py and device_cache.py."""

import concurrent.futures
import io
import itertools
import json
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from simsiam_jax import errors, lazy_tf
from simsiam_jax.data import device_cache, files, host, sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler

N = 14  # images
BATCH = 4
WHOLE = slice(0, BATCH)
RECIPES = (Recipe(size=12, mean=(0.5,), std=(0.5,)), Recipe(size=8, jitter=0.0, gray=0.0, blur=0.0))


def encode(image: np.ndarray, kind: str = 'png', mode: str = '') -> bytes:
    file = io.BytesIO()
    picture = PIL.Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, kind)
    return file.getvalue()


def gradient(height: int, width: int, blue: int = 0) -> np.ndarray:
    """Returns an RGB image without detail, which JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(x, blue)], -1).astype(
        np.uint8
    )


@pytest.fixture(scope='module')
def photographs() -> np.ndarray:
    figures = np.load(pathlib.Path(__file__).parent / 'figures' / 'augmentation.npz')
    return np.stack([figures['photograph'][i : i + 30, i : i + 40] for i in range(N)])


@pytest.fixture(scope='module')
def folder(tmp_path_factory, photographs) -> pathlib.Path:
    root = tmp_path_factory.mktemp('images')
    for i, image in enumerate(photographs):
        (root / f'{i:02}.png').write_bytes(encode(image))
    return root


@pytest.fixture(scope='module')
def source(folder) -> sources.Source:
    return sources.open_source(f'folder:{folder}')


def touch(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')
    return root


def names(source: sources.Source, root: pathlib.Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def labels(source: sources.Source) -> list[int]:
    return [source.read(i)[1] for i in range(len(source))]


def test_sampler_permutes_each_epoch_differently() -> None:
    sampler = IndexSampler(seed=0, size=12, batch_size=3)
    epochs = [np.concatenate([sampler.indices(4 * e + b) for b in range(4)]) for e in range(5)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    other = IndexSampler(seed=1, size=12, batch_size=3)
    epochs.append(np.concatenate([other.indices(b) for b in range(4)]))
    for one, two in itertools.combinations(epochs, 2):
        assert (one != two).any()
    again = IndexSampler(seed=0, size=12, batch_size=3)
    np.testing.assert_array_equal(again.indices(17), sampler.indices(17))


def test_sampler_drops_last_incomplete_batch() -> None:
    sampler = IndexSampler(seed=0, size=11, batch_size=3)
    assert sampler.steps_per_epoch == 3
    assert sampler.steps(1.5) == 4
    epoch = np.concatenate([sampler.indices(b) for b in range(3)])
    assert len(np.unique(epoch)) == 9


def test_sampler_rng_differs_by_seed_step_and_view() -> None:
    keys = itertools.product((0, 1), (0, 1, 2), (0, 1))
    draws = [IndexSampler(seed, 12, 3).rng(step, view).random() for seed, step, view in keys]
    assert len(set(draws)) == 12


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0, 5, 6), r'batch_size is 6, but the training source has only 5 images'),
        ((0, 5, 0), r'batch_size is 0; expected 1 or more'),
        ((-1, 5, 5), r'seed is -1; expected 0 or more'),
    ],
)
def test_sampler_rejects_impossible_arguments(arguments, message) -> None:
    with pytest.raises(errors.UserError, match=message):
        IndexSampler(*arguments)


def train(source, on_device: str, start: int, stop: int, local: slice = WHOLE) -> list:
    return list(
        host.train_batches(
            Reader(source, 3),
            IndexSampler(0, len(source), BATCH),
            RECIPES,
            on_device=on_device,
            canvas=48,
            start=start,
            stop=stop,
            local=local,
        )
    )


@pytest.fixture(scope='module', params=host.ON_DEVICE)
def on_device(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def run(source, on_device) -> list:
    return train(source, on_device, 0, 5)  # three steps per epoch: reaches the second


def assert_equal(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_train_batches_shapes_and_dtypes(on_device, run) -> None:
    images = [run[0]['image']] if on_device == 'all' else run[0]['crops']
    expected = [(4, 48, 48, 3)] if on_device == 'all' else [(4, 12, 12, 3), (4, 8, 8, 3)]
    assert [view.shape for view in images] == expected
    assert all(view.dtype == np.uint8 for view in images)
    key = 'image' if on_device == 'all' else 'crops'
    assert (run[0][key][0] != run[3][key][0]).any()


def test_train_batches_repeat_and_resume_bit_exactly(source, on_device, run) -> None:
    if on_device != 'none':  # compiling 'none' takes seconds, and resuming repeats it too
        assert_equal(train(source, on_device, 0, 5), run)
    assert_equal(train(source, on_device, 2, 5), run[2:])


def test_train_batches_of_two_hosts_make_the_batch(source, on_device, run) -> None:
    locals_ = [slice(0, 2), slice(2, 4)]
    for local in locals_[1:] if on_device == 'none' else locals_:  # as above
        expected = jax.tree.map(lambda x, local=local: x[local], run[:2])
        assert_equal(train(source, on_device, 0, 2, local), expected)


def at(block: Any, position: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[position], block)


def cached_batches(start: int, stop: int, local: slice = WHOLE, **devices) -> list:
    sampler, devices = IndexSampler(0, N, BATCH), {'send': dict, 'select': at} | devices
    steps = {'start': start, 'stop': stop, 'local': local}
    return list(device_cache.train_batches(sampler, RECIPES, **steps, **devices))


def test_device_cache_repeats_resumes_and_splits() -> None:
    run = cached_batches(0, 5)
    assert_equal(cached_batches(0, 5), run)
    assert_equal(cached_batches(2, 5), run[2:])
    parts = [cached_batches(0, 5, local) for local in (slice(0, 2), slice(2, 4))]
    assert_equal(jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts), run)


def test_device_cache_draws_in_blocks_what_the_host_draws(monkeypatch) -> None:
    monkeypatch.setattr(device_cache, '_BLOCK_STEPS', 3)
    sent = []
    batches = cached_batches(1, 9, send=lambda block: sent.append(block) or block)
    sampler = IndexSampler(0, N, BATCH)
    for step, batch in enumerate(batches, 1):
        index, views = sample_batch_params(sampler, RECIPES, step, WHOLE)
        assert_equal(batch, {'index': index, 'views': views})
    assert [len(block['index']) for block in sent] == [3, 3, 3]


def test_device_cache_raises_what_fails_in_the_background() -> None:
    def fail(block):
        raise OSError('no space on the device')

    with pytest.raises(OSError, match='no space on the device'):
        cached_batches(0, 2, send=fail)


def test_gatherer_returns_images_of_the_indices(photographs) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    labels = jnp.arange(len(photographs))
    select = device_cache.gatherer(jnp.asarray(photographs), labels, sharding)
    (batch,) = cached_batches(1, 2)
    (gathered,) = cached_batches(1, 2, send=jax.device_put, select=select)
    np.testing.assert_array_equal(gathered['image'], photographs[batch['index']])
    np.testing.assert_array_equal(gathered['label'], batch['index'])
    assert_equal(gathered['views'], batch['views'])


def evaluate(module, source, resize: int, local: slice = WHOLE, size: int = 12):
    arguments = {'batch_size': BATCH, 'size': size, 'resize': resize, 'local': local}
    if module is host:
        batches = host.eval_batches(Reader(source, 3), **arguments)
    else:
        batches = device_cache.eval_batches(source, channels=3, **arguments)
    images, batch_labels, indices = map(np.concatenate, zip(*batches, strict=True))
    return images, np.where(indices >= 0, batch_labels, -1)


@pytest.fixture(scope='module')
def labeled(folder, source) -> files.FileSource:
    return files.FileSource(source.paths, list(range(N)), tuple('abcdefghijklmn'))


def test_eval_batches_contain_every_image_once(labeled, photographs) -> None:
    cached = sources.ArraySource(photographs, np.arange(N), labeled.classes)
    images, batch_labels = evaluate(host, labeled, 16)
    assert images.shape == (16, 12, 12, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(batch_labels, [*range(N), -1, -1])
    assert not images[N:].any()
    assert len(np.unique(images[:N], axis=0)) == N

    floats, cached_labels = evaluate(device_cache, cached, 16)
    np.testing.assert_array_equal(cached_labels, batch_labels)
    # Half a step is the rounding to uint8.
    np.testing.assert_allclose(floats[:N], images[:N] / 255, rtol=0, atol=0.51 / 255)

    for module, whole in ((host, labeled), (device_cache, cached)):
        parts = [evaluate(module, whole, 16, local) for local in (slice(0, 1), slice(1, 4))]
        of_two = [a.reshape(4, -1, 12, 12, 3) for a, _ in parts]
        joined = np.concatenate(of_two, axis=1).reshape(16, 12, 12, 3)
        np.testing.assert_array_equal(joined, images if module is host else floats)


def test_eval_batches_without_resize_keep_images(tmp_path) -> None:
    image = gradient(12, 12)
    (tmp_path / 'a.png').write_bytes(encode(image))
    images, _ = evaluate(host, sources.open_source(f'folder:{tmp_path}'), 0)
    np.testing.assert_array_equal(images[0], image)
    cached = sources.ArraySource(image[None], np.zeros(1, int), ('one',))
    floats, _ = evaluate(device_cache, cached, 0)
    np.testing.assert_allclose(floats[0], image / 255, rtol=1e-6)


def test_eval_batches_name_sizes_that_do_not_fit(labeled, photographs) -> None:
    cached = sources.ArraySource(photographs, np.arange(N), labeled.classes)
    with pytest.raises(
        errors.UserError, match=r'\d\d\.png is 30x40; expected 12x12.*Set .*eval\.resize'
    ):
        evaluate(host, labeled, 0)
    with pytest.raises(
        errors.UserError, match=r'images are 30x40; expected 12x12.*Set .*eval\.resize'
    ):
        evaluate(device_cache, cached, 0)
    for module, source in ((host, labeled), (device_cache, cached)):
        with pytest.raises(errors.UserError, match=r'eval\.resize is 11, below .*size 12'):
            evaluate(module, source, 11)


def test_eval_batches_and_cache_reject_other_channels(source, photographs) -> None:
    cached = sources.ArraySource(photographs, np.arange(N), ())
    with pytest.raises(errors.UserError, match=r'channels is 1, but the images have 3 channels'):
        device_cache.check_images(cached, 1)
    batches = host.eval_batches(
        Reader(source, 5), batch_size=BATCH, size=12, resize=16, local=WHOLE
    )
    with pytest.raises(errors.UserError, match=r'shape \(30, 40, 3\); expected \[H, W, 5\]'):
        next(batches)


def test_folder_source_subfolders_are_classes(tmp_path) -> None:
    touch(tmp_path, 'dog/x/1.png', 'cat/2.JPG', 'dog/0.jpeg', 'cat/notes.txt', 'empty.txt')
    source = sources.open_source(f'folder:{tmp_path}')
    assert source.classes == ('cat', 'dog')
    assert names(source, tmp_path) == ['cat/2.JPG', 'dog/0.jpeg', 'dog/x/1.png']
    assert labels(source) == [0, 1, 1]


@pytest.mark.parametrize(
    'files',
    [('a.png', 'b.png'), ('all/a.png', 'all/b.png'), ('all/x/a.png', 'all/y/b.png')],
    ids=['no subfolder', 'one subfolder', 'one subfolder with subfolders'],
)
def test_folder_source_without_classes(tmp_path, files) -> None:
    source = sources.open_source(f'folder:{touch(tmp_path, *files)}/')
    assert names(source, tmp_path) == list(files)
    assert source.classes == ()
    assert labels(source) == [-1, -1]


def test_folder_source_images_next_to_subfolders(tmp_path) -> None:
    source = sources.open_source(f'folder:{touch(tmp_path, "a/1.png", "b/2.png", "3.png")}')
    assert source.classes == ()
    assert labels(source) == [-1, -1, -1]


def test_folder_source_follows_links_without_cycles(tmp_path) -> None:
    far = touch(tmp_path / 'far', 'deep/1.png')
    root = touch(tmp_path / 'root', 'a/0.png', 'a/.hidden.png', '.cache/2.png')
    (root / 'b').symlink_to(far)
    (root / 'a' / 'up').symlink_to(root)
    (far / 'round').symlink_to(far)
    (root / 'a' / 'link.png').symlink_to(far / 'deep' / '1.png')
    source = sources.open_source(f'folder:{root}')
    assert names(source, root) == ['a/0.png', 'a/link.png', 'b/deep/1.png']
    assert source.classes == ('a', 'b')


def test_files_source_paths_are_relative_to_the_list(tmp_path) -> None:
    touch(tmp_path, 'x/a.png', 'b.png')
    (tmp_path / 'list.txt').write_text(f'x/a.png\n\n  {tmp_path}/b.png  \n')
    source = sources.open_source(f'files:{tmp_path}/list.txt')
    assert names(source, tmp_path) == ['x/a.png', 'b.png']
    assert source.classes == ()
    assert labels(source) == [-1, -1]


def test_digits_splits_are_disjoint() -> None:
    whole, train, test = (
        sources.open_source(spec) for spec in ('digits', 'digits/train', 'digits/test')
    )
    assert len(whole) == len(train) + len(test) == 1797
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.max() == 255
    assert train.classes == test.classes == tuple('0123456789')
    pictures = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in pictures for image in test.images)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('folder:{tmp}/none', r'image folder .*/none does not exist'),
        ('folder:{tmp}', r'image folder .* contains no images; expected \.jpg'),
        ('folder:', r"source is 'folder:'; expected folder:DIR"),
        ('foldr:{tmp}', r"source is 'foldr:.*'; did you mean folder:DIR\?"),
        ('{tmp}', r"source is '(.*)'; did you mean folder:\1\?"),
        ('digits/tets', r"source is 'digits/tets'; did you mean digits/test\?"),
        ('', r"source is ''; expected one of tfds:NAME/SPLIT, folder:DIR, files:LIST, zip:FILE"),
        ('files:{tmp}/none', r'list of images .*/none does not exist'),
        ('files:{tmp}/empty.txt', r'list of images .* is empty'),
        ('files:{tmp}/binary.txt', r'list of images .* is not text'),
        ('tfds:cifar10', r'source is tfds:cifar10; expected tfds:NAME/SPLIT'),
    ],
)
def test_open_source_explains_invalid_sources(tmp_path, spec, message) -> None:
    (tmp_path / 'empty.txt').write_text('\n')
    (tmp_path / 'binary.txt').write_bytes(b'\xff\xd8\xff\xe0\x00\x10JFIF')
    with pytest.raises(errors.UserError, match=message):
        sources.open_source(spec.format(tmp=tmp_path))


@pytest.fixture(scope='module')
def tfds():
    lazy_tf.load()
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory, tfds, photographs) -> str:
    """Returns a folder of datasets.

    tiny, plain (without labels) and words (without images) are array_record; records is TFRecord.
    """
    root = str(tmp_path_factory.mktemp('tfds'))
    image = tfds.features.Image(shape=(None, None, 3), encoding_format='png')
    label = tfds.features.ClassLabel(names=['cat', 'dog', 'eel'])
    rows = [{'image': x, 'label': i % 3} for i, x in enumerate(photographs)]
    for name, features, file_format in (
        ('tiny', {'image': image, 'label': label}, 'array_record'),
        ('plain', {'image': image}, 'array_record'),
        ('words', {'text': tfds.features.Text()}, 'array_record'),
        ('records', {'image': image, 'label': label}, 'tfrecord'),
    ):
        examples = [{k: row.get(k, 'text') for k in features} for row in rows]
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version='1.0.0',
            features=tfds.features.FeaturesDict(features),
            split_datasets={'train': list(enumerate(examples))},
            data_dir=root,
            file_format=file_format,
            disable_shuffling=True,
        )
    return root


def test_tfds_source_reads_by_index_and_split(tfds_dir, photographs, source) -> None:
    whole = sources.open_source('tfds:tiny/train', tfds_dir)
    assert len(whole) == N
    assert whole.classes == ('cat', 'dog', 'eel')
    assert labels(whole) == [i % 3 for i in range(N)]
    assert whole.name(3) == 'tfds:tiny/train[3]'
    encoded, _ = whole.read(5)
    np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(encoded)), photographs[5])
    for ours, files_ in zip(train(whole, 'all', 0, 2), train(source, 'all', 0, 2), strict=True):
        np.testing.assert_array_equal(ours.pop('label'), ours['index'] % 3)
        assert files_.pop('label').tolist() == [-1] * BATCH
        assert_equal(ours, files_)

    half, rest = (
        sources.open_source(f'tfds:tiny/{split}', tfds_dir)
        for split in ('train[:50%]', 'train[50%:]')
    )
    assert len(half) == len(rest) == N // 2
    assert labels(half) + labels(rest) == labels(whole)
    assert rest.read(0) == whole.read(N // 2)


def test_tfds_source_reads_converted_tfrecord(tfds_dir, tmp_path) -> None:
    # `tfds convert_format` leaves both formats, and TFRecord is still the main format.
    shutil.copytree(f'{tfds_dir}/records', tmp_path / 'records')
    version = tmp_path / 'records' / '1.0.0'
    shutil.copy(
        f'{tfds_dir}/tiny/1.0.0/tiny-train.array_record-00000-of-00001',
        version / 'records-train.array_record-00000-of-00001',
    )
    info = json.loads((version / 'dataset_info.json').read_text())
    info['alternativeFileFormats'] = ['array_record']
    (version / 'dataset_info.json').write_text(json.dumps(info))
    converted = sources.open_source('tfds:records/train', str(tmp_path))
    assert labels(converted) == [i % 3 for i in range(N)]


def test_tfds_source_reads_tfrecord(tfds_dir, photographs) -> None:
    records = sources.open_source('tfds:records/train', tfds_dir)
    assert labels(records) == [i % 3 for i in range(N)]
    for i, image in enumerate(photographs):
        np.testing.assert_array_equal(Reader(records, 3).example(i)[0], image)


def test_tfds_source_without_labels(tfds_dir) -> None:
    plain = sources.open_source('tfds:plain:1.0.0/train', tfds_dir)
    assert plain.classes == ()
    assert labels(plain) == [-1] * N


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('tiny/trian', r"source is tfds:tiny/trian: Unknown split 'trian'.*\['train'\]"),
        ('tiny/train[', r'source is tfds:tiny/train\[: Error parsing split'),
        ('tiny/train[:0]', r'source is tfds:tiny/train\[:0\]: the split is empty'),
        ('imagenet2021/train', r'no dataset imagenet2021; did you mean imagenet2012\?'),
        ('qqqqqqqqqqqqqqqq/train', r'no dataset q+; tfds\.list_builders\(\) lists its names'),
        ('cifar10/none/train', r'TFDS cannot open cifar10/none: .*BuilderConfig none not found'),
        ('cifar10:0.0.1/train', r'TFDS cannot open cifar10:0\.0\.1: .* only: '),
        ('no such/train', r'TFDS cannot open no such: '),
        ('words/train', r'TFDS dataset words has no feature image; its features are text'),
        (
            'imagenet2012/train',
            r'could not prepare imagenet2012 .*/downloads/manual does not exist .* '
            r'ILSVRC2012_img_train\.tar .*register',
        ),
    ],
)
def test_tfds_failures_are_one_line_errors(tfds_dir, spec, message) -> None:
    with pytest.raises(errors.UserError, match=message) as caught:
        sources.open_source(f'tfds:{spec}', tfds_dir)
    assert '\n' not in str(caught.value)


def test_tfds_dataset_is_prepared_by_one_of_several_processes(tmp_path, tfds, capsys) -> None:
    generated = []

    class Slowly(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = tfds.features.FeaturesDict({'image': tfds.features.Image()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            generated.append(1)
            time.sleep(1)
            yield 0, {'image': np.zeros((4, 4, 3), np.uint8)}

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        opened = threads.map(sources.open_source, ['tfds:slowly/train'] * 2, [str(tmp_path)] * 2)
        assert [len(source) for source in opened] == [1, 1]
    assert len(generated) == 1
    assert 'waiting for another process that prepares slowly' in capsys.readouterr().out


def test_tfds_failed_download_is_one_line_error(tmp_path, tfds) -> None:
    class Unreachable(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = tfds.features.FeaturesDict({'image': tfds.features.Image()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {'train': dl_manager.download('http://127.0.0.1:9/images.zip')}

        def _generate_examples(self):
            yield from ()  # never reached: the download fails

    with pytest.raises(errors.UserError, match=r'could not prepare unreachable in .*: ') as caught:
        sources.open_source('tfds:unreachable/train', str(tmp_path))
    assert '\n' not in str(caught.value)
