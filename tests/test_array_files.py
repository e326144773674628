"""Tests of data/array_files.py: npz: and npy: sources."""

import pathlib
import re

import jax
import numpy as np
import pytest
from configurations import load
from PIL import Image

from simsiam_jax import errors
from simsiam_jax.data import sources
from simsiam_jax.data.decode import decode
from simsiam_jax.tasks import inputs, pretrain_setup

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 9, 10, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
CIFAR10 = pathlib.Path(__file__).parent / 'figures' / 'cifar10.npz'  # 150 + 50 images


def write(path: pathlib.Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f'npz:{path}'


@pytest.mark.parametrize('column', [False, True])
def test_npz_has_splits_labels_and_classes(tmp_path: pathlib.Path, column: bool) -> None:
    labels = LABELS[:, None] if column else LABELS
    arrays = {'train_images': IMAGES, 'train_labels': labels, 'test_images': IMAGES[:, ..., 0]}
    spec = write(tmp_path / 'a.npz', **arrays, classes=np.array(['x', 'y', 'z']))
    train, test = (sources.open_source(f'{spec}/{split}') for split in ('train', 'test'))
    assert train.classes == ('x', 'y', 'z')
    assert [train.read(i)[1] for i in range(12)] == LABELS.tolist()
    np.testing.assert_array_equal(decode(train.read(5)[0], 3), IMAGES[5])
    assert test.classes == ()
    np.testing.assert_array_equal(decode(test.read(5)[0], 1), IMAGES[5, ..., :1])
    assert train.name(5) == f'{tmp_path}/a.npz[train_images][5]'


def test_npy_takes_labels_and_names_classes_by_number(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / 'x.npy', IMAGES)
    np.save(tmp_path / 'y.npy', LABELS)
    source = sources.open_source(f'npy:{tmp_path}/x.npy,{tmp_path}/y.npy')
    assert source.classes == ('0', '1', '2')
    assert sources.open_source(f'npy:{tmp_path}/x.npy').classes == ()
    held = sources.open_source(f'split:0.4/test:npy:{tmp_path}/x.npy,{tmp_path}/y.npy')
    assert set(held.labels) == {0, 1, 2}
    assert 3 <= len(held) < 12


def test_identity_follows_pixels_not_place(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'b').mkdir()
    changed = IMAGES.copy()
    changed[7, 0, 0, 0] ^= 1
    prints = [
        sources.fingerprint(sources.open_source(write(tmp_path / name, images=images)))
        for name, images in (('a.npz', IMAGES), ('b/c.npz', IMAGES), ('d.npz', changed))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_batches_equal_those_of_image_files(tmp_path: pathlib.Path) -> None:
    spec = write(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)
    rows = []
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        Image.fromarray(image).save(tmp_path / f'{i}.png')
        rows.append(f'{i}.png,{label}')
    (tmp_path / 'list.csv').write_text('\n'.join(rows))
    views, readers = [], []
    for source in (spec, f'files:{tmp_path}/list.csv'):
        config = load('folder')
        config.data.source = source
        config.batch_size, config.augment.size = 8, 8
        setup = pretrain_setup.build(config)
        views.append(jax.device_get(setup.to_views(next(setup.batches(0, 1)))))
        config.data.backend = 'host'
        readers.append(inputs.open_source(source, config.data))
    np.testing.assert_array_equal(*views)
    for i in range(12):
        (image, label), (expected, _) = (reader.example(i) for reader in readers)
        np.testing.assert_array_equal(image, expected)
        assert label == LABELS[i]


def test_range_selects_images_of_a_split(tmp_path: pathlib.Path) -> None:
    spec = write(tmp_path / 'a.npz', train_images=IMAGES, train_labels=LABELS, images=IMAGES)
    first = sources.open_source(f'{spec}/train[:4]')
    assert [first.read(i)[1] for i in range(len(first))] == LABELS[:4].tolist()
    assert (first.classes, first.name(3)) == (
        ('0', '1', '2'),
        f'{tmp_path}/a.npz[train_images][3]',
    )
    last = sources.open_source(f'{spec}[-2:]')
    np.testing.assert_array_equal(decode(last.read(0)[0], 3), IMAGES[10])
    with pytest.raises(errors.UserError, match=r'train\[20:\] has no images: .* has 12'):
        sources.open_source(f'{spec}/train[20:]')
    with pytest.raises(errors.UserError, match=r'expected npz:FILE\.npz/SPLIT or .*\[:5000\]'):
        sources.open_source(f'{spec}/train[:10%]')


def test_photographs_of_cifar_equal_those_in_a_folder(tmp_path: pathlib.Path) -> None:
    with np.load(CIFAR10) as file:
        order = np.argsort(file['test_labels'], kind='stable')  # as folders are listed
        images, labels = file['test_images'][order], file['test_labels'][order]
        classes = file['classes']
    spec = write(tmp_path / 'a.npz', images=images, labels=labels, classes=classes)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / 'folder' / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f'{i:02}.png')
    batches, names = [], []
    for source in (spec, f'folder:{tmp_path}/folder'):
        config = load('cifar10:small', data__source=source, eval__train='', eval__test='')
        config.batch_size = 16
        setup = pretrain_setup.build(config)
        (batch,) = setup.batches(2, 3)
        batches.append(jax.device_get([*setup.to_views(batch), batch['label']]))
        names.append(setup.source.classes)
    assert names[0] == names[1] == tuple(classes)
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_large_array_is_read_by_index(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / 'x.npy', IMAGES)
    data = load('folder').data
    assert isinstance(inputs.open_source(f'npy:{tmp_path}/x.npy', data), sources.ArraySource)
    data.resident_limit = IMAGES.nbytes - 1
    reader = inputs.open_source(f'npy:{tmp_path}/x.npy', data)
    np.testing.assert_array_equal(reader.example(3)[0], IMAGES[3])


def test_arrays_of_other_types_are_stretched(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / 'x.npy', IMAGES * np.float32(40) - 100)
    data = load('folder').data
    source = inputs.open_source(f'npy:{tmp_path}/x.npy', data)
    np.testing.assert_allclose(source.images, IMAGES, atol=3)
    assert data.range.startswith('-')


@pytest.mark.parametrize(
    ('arrays', 'split', 'message'),
    [
        ({'images': IMAGES.astype(complex)}, '', 'is complex128; expected integers or floats'),
        ({'images': IMAGES.transpose(0, 3, 1, 2)[:, :, :, :9]}, '', r'looks like \[N, C, H, W\]'),
        ({'images': IMAGES[0, 0]}, '', r'has shape \(10, 3\); expected \[N, H, W\] or'),
        ({'images': IMAGES, 'labels': LABELS[:5]}, '', 'expected 12 integers, one for each image'),
        ({'images': IMAGES, 'labels': LABELS / 2}, '', 'labels of .* are float64'),
        (
            {'images': IMAGES, 'labels': LABELS, 'classes': np.array(['a', 'b'])},
            '',
            'labels of .* are from 0 to 2; expected 0 to 1',
        ),
        (
            {'train_images': IMAGES, 'val_images': IMAGES},
            '',
            'has no array images; it has train_images, val_images. Use npz:.*/train or npz:.*/val',
        ),
        ({'x': IMAGES}, '/train', 'has no array train_images; it has x. Save the images as'),
        ({'images': np.array([None])}, '', 'contains Python objects, which may run code'),
    ],
)
def test_other_arrays_are_refused(
    arrays: dict, split: str, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.UserError, match=message):
        sources.open_source(write(tmp_path / 'a.npz', **arrays) + split)


def test_missing_and_damaged_files_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r'images .*none\.npz does not exist'):
        sources.open_source(f'npz:{tmp_path}/none.npz/train')
    whole = tmp_path / 'whole.npz'
    write(whole, images=IMAGES)
    np.save(tmp_path / 'x.npy', IMAGES)
    for path, prefix in ((whole, 'npz'), (tmp_path / 'x.npy', 'npy')):
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(errors.UserError, match=f'{re.escape(str(path))} cannot be read: '):
            sources.open_source(f'{prefix}:{path}')
