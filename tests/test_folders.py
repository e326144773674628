"""Tests of data/image_files.py, class_names.py, patterns.py, listed.py: images of any folders."""

import importlib.util
import os
import pathlib
import unicodedata

import numpy as np
import pytest
from configurations import load
from PIL import Image

from simsiam_jax import errors, lazy_tf
from simsiam_jax.data import image_files, listing, overlap, subset, survey
from simsiam_jax.data.decode import decode
from simsiam_jax.data.patterns import Patterns
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sources import fingerprint, open_source
from simsiam_jax.tasks import inputs
from simsiam_jax.tools.doctor import context, image_checks, masks


def touch(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def labeled(source) -> dict[str, str]:
    """Class of each image."""
    return dict(zip(source.names(), [source.classes[i] for i in source.labels], strict=True))


@pytest.mark.parametrize('kind', image_files.EXTENSIONS)
def test_every_kind_of_image_is_decoded(kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f'image{kind.upper()}'
    pixels = np.full((16, 16, 3), 255, np.uint8)
    if kind == '.npy':
        with path.open('wb') as file:
            np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(path, Image.registered_extensions()[kind])
    source = open_source(f'folder:{tmp_path}')
    assert (decode(source.read(0)[0], 3) >= 250).all()


def test_skipped_files_are_counted_by_extension(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: None)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'LARGE', 1)
    root = touch(tmp_path / 'images', 'a.png', 'b.heic', 'c.HEIC', 'x/d.dcm', 'e.txt', 'README')
    touch(root, 'f.txt', 'g.zip')
    for start in ('listed', 'from the cache'):
        errors.warn_once.cache_clear()
        assert open_source(f'folder:{root}').names() == ['a.png'], start
        assert capsys.readouterr().err == (
            f"warning: image folder {root}: skipped 2 .heic (pip install 'simsiam_jax[heic]'), "
            "1 .dcm (pip install 'simsiam_jax[dicom]'), 1 .zip (use zip:FILE), 2 .txt, "
            '1 without extension\n'
        )
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: object())
    names = ['a.png', 'b.heic', 'c.HEIC', 'x/d.dcm']
    assert open_source(f'folder:{root}').names() == names  # not those of the cache


def test_files_without_extension_are_images_if_they_begin_like_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new('RGB', (4, 4))
    for kind in ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'JPEG2000', 'AVIF'):
        image.save(tmp_path / kind, kind)
    image.save(tmp_path / 'scan.2024', 'PNG')
    np.save(tmp_path / 'array.npy', np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'array.npy').rename(tmp_path / 'NPY')
    (tmp_path / 'DICOM').write_bytes(bytes(128) + b'DICM')
    (tmp_path / 'LICENSE').write_text('BM: You may use this.')
    (tmp_path / 'EMPTY').touch()
    os.mkfifo(tmp_path / 'PIPE')
    expected = {p.name for p in tmp_path.iterdir()} - {'DICOM', 'LICENSE', 'EMPTY', 'PIPE'}
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: None)
    source = open_source(f'folder:{tmp_path}')
    assert set(source.names()) == expected
    assert all(decode(source.read(i)[0], 3).shape == (4, 4, 3) for i in range(len(source)))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: object())
    assert set(open_source(f'folder:{tmp_path}').names()) == expected | {'DICOM'}


def test_folder_without_images_names_what_it_has(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(errors.UserError, match=r'contains no images; expected \.jpg'):
        open_source(f'folder:{touch(tmp_path, "train.parquet")}')
    assert '1 .parquet (use parquet:FILE)' in capsys.readouterr().err
    with pytest.raises(errors.UserError, match=r'is not a folder\. Use parquet:/.*train\.parquet'):
        open_source(f'folder:{tmp_path}/train.parquet')


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path: pathlib.Path) -> None:
    composed, apart = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert composed != apart
    root = touch(tmp_path, f'{composed}/0.png', f'{apart}/1.png', 'tea/2.png')
    source = open_source(f'folder:{root}')
    assert source.classes == (composed, 'tea')
    assert sorted(source.labels) == [0, 0, 1]
    assert len(open_source(f'folder:{root}', '', Patterns(include=composed))) == 2
    (tmp_path / 'list.csv').write_text(f'a.png,{apart}\nb.png,{composed}\n')
    assert open_source(f'files:{tmp_path}/list.csv').classes == (composed,)


def test_similar_names_of_classes_are_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    root = touch(tmp_path, 'Cat/0.png', 'cat/1.png', 'red fox/2.png', 'redfox/3.png', 'dog/4.png')
    assert len(open_source(f'folder:{root}').classes) == 5
    warning = capsys.readouterr().err
    assert f"the classes 'Cat' and 'cat'; 'red fox' and 'redfox' of {root} differ only" in warning


def test_root_of_a_dataset_names_its_parts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    root = touch(tmp_path, 'train/a/0.png', 'train/b/1.png', 'val/a/2.png', 'val/b/3.png')
    open_source(f'folder:{root}')
    warning = capsys.readouterr().err
    assert f'{root} has the parts train and val of a dataset as subfolders' in warning
    assert f'config.data.source and config.eval.train to folder:{root}/train' in warning
    assert f'config.eval.test to folder:{root}/val' in warning
    assert warning.count('\n') == 1
    open_source(f'folder:{root}/train')
    assert capsys.readouterr().err == ''


def test_stray_image_beside_classes_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    root = touch(tmp_path, 'a/0.png', 'b/1.png', 'cover.png')
    assert open_source(f'folder:{root}').classes == ()
    warning = capsys.readouterr().err
    assert f'{root} has no classes, because 1 of 3 images are beside its 2 subf' in warning
    assert '(cover.png)' in warning
    without = open_source(f'folder:{root}', '', Patterns(exclude='cover.png'))
    assert labeled(without) == {'a/0.png': 'a', 'b/1.png': 'b'}


def test_single_subfolder_is_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    root = touch(tmp_path, 'all/a/0.png', 'all/b/1.png')
    assert open_source(f'folder:{root}').classes == ()
    assert f'To use its 2 subfolders as classes, give {root}/all' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('patterns', 'expected'),
    [
        (Patterns(include='*.jpg'), ['a/GT/4.JPG', 'a/Imgs/1.jpg', 'b/Imgs/2.jpg', 'top.jpg']),
        (Patterns(include='*/Imgs/*.jpg'), ['a/Imgs/1.jpg', 'b/Imgs/2.jpg']),
        (Patterns(include='Imgs'), ['a/Imgs/1.jpg', 'b/Imgs/2.jpg', 'b/Imgs/2_mask.png']),
        (Patterns(include='*.jpg', exclude='GT, top*'), ['a/Imgs/1.jpg', 'b/Imgs/2.jpg']),
        (Patterns(exclude='*.jpg'), ['a/GT/1.png', 'b/Imgs/2_mask.png']),
        (Patterns(exclude='/a/,top.jpg,[0-9]_mask.*'), ['b/Imgs/2.jpg']),
    ],
)
def test_patterns_select_files_and_folders(
    patterns: Patterns, expected: list[str], tmp_path: pathlib.Path
) -> None:
    root = touch(tmp_path, 'a/Imgs/1.jpg', 'a/GT/1.png', 'a/GT/4.JPG', 'b/Imgs/2.jpg')
    touch(root, 'b/Imgs/2_mask.png', 'top.jpg')
    assert open_source(f'folder:{root}', '', patterns).names() == expected


def test_classes_are_the_first_folders_that_differ_among_selected_files(
    tmp_path: pathlib.Path,
) -> None:
    root = touch(tmp_path, 'Imgs/a/1.jpg', 'Imgs/b/2.jpg', 'GT/a/1.png', 'GT/b/2.png')
    selected = open_source(f'folder:{root}', '', Patterns(include='Imgs'))
    assert labeled(selected) == {'Imgs/a/1.jpg': 'a', 'Imgs/b/2.jpg': 'b'}
    root = touch(tmp_path / '2', 'a/Imgs/1.jpg', 'b/Imgs/2.jpg', 'a/GT/1.png', 'b/GT/2.png')
    selected = open_source(f'folder:{root}', '', Patterns(include='*/Imgs/*.jpg'))
    assert labeled(selected) == {'a/Imgs/1.jpg': 'a', 'b/Imgs/2.jpg': 'b'}


def test_patterns_that_match_nothing_are_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    root = touch(tmp_path, 'a.png')
    with pytest.raises(
        errors.UserError, match=r"none of the 1 images .*include='\*\.jpg' .*first is 'a\.png'"
    ):
        open_source(f'folder:{root}', '', Patterns(include='*.jpg'))
    assert len(open_source(f'folder:{root}', '', Patterns(exclude='*_mask*'))) == 1
    assert "config.data.exclude is '*_mask*', which matches none" in capsys.readouterr().err
    assert len(open_source('digits', '', Patterns(exclude='*_mask*'))) == 1797
    assert 'config.data.exclude do not apply to digits' in capsys.readouterr().err


def test_configuration_selects_files_of_all_sets(tmp_path: pathlib.Path) -> None:
    root = touch(tmp_path, 'a/1.png', 'a/1_mask.png', 'b/2.png')
    config = load('folder', data__exclude='*_mask.*')
    config.data.update(backend='host', range='dtype')
    assert inputs.open_source(f'folder:{root}', config.data).source.names() == [
        'a/1.png',
        'b/2.png',
    ]


def test_wildcards_open_several_folders(tmp_path: pathlib.Path) -> None:
    root = touch(tmp_path, 'x/images/cat/1.png', 'x/masks/cat/1.png', 'y/images/dog/2.png')
    touch(root, 'y/images/cat/3.png')
    source = open_source(f'folder:{root}/*/images')
    assert labeled(source) == {
        'x/images/cat/1.png': 'cat',
        'y/images/cat/3.png': 'cat',
        'y/images/dog/2.png': 'dog',
    }
    (root / 'y').rename(root / 'z')
    assert fingerprint(open_source(f'folder:{root}/*/images'))['count'] == 3
    with pytest.raises(errors.UserError, match=r'no image folder matches /.*/\*/none; expected'):
        open_source(f'folder:{root}/*/none')


def test_wildcards_name_the_classes_of_folders_without_subfolders(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path, 'cat/images/1.png', 'cat/masks/1.png', 'dog/images/2.png')
    expected = {'cat/images/1.png': 'cat', 'dog/images/2.png': 'dog'}
    assert labeled(open_source(f'folder:{root}/*/images')) == expected
    monkeypatch.chdir(root)
    assert labeled(open_source('folder:*/images')) == expected
    touch(tmp_path, 'a[1]/x.png')
    assert open_source(f'folder:{root}/a[1]').names() == ['x.png']  # such a folder exists


def test_wildcards_open_several_remote_folders() -> None:
    tf = lazy_tf.load()
    for name in ('x/images/cat/1.png', 'y/images/dog/2.png', 'y/other/3.png'):
        tf.io.gfile.makedirs(os.path.dirname(f'ram://wild/{name}'))
        with tf.io.gfile.GFile(f'ram://wild/{name}', 'w') as file:
            file.write('image')
    source = open_source('folder:ram://wild/*/images')
    assert labeled(source) == {'x/images/cat/1.png': 'cat', 'y/images/dog/2.png': 'dog'}
    with pytest.raises(errors.UserError, match=r'no image folder matches ram://wild/\*/none'):
        open_source('folder:ram://wild/*/none')


def test_combined_sources_unite_classes_by_name(tmp_path: pathlib.Path) -> None:
    first = touch(tmp_path / 'c++' / 'a', 'cat/1.png', 'fox/2.png')
    second = touch(tmp_path / 'b', 'dog/3.png', 'fox/4.png')
    (second / 'list.csv').write_text('dog/3.png,ape\n')
    spec = f'folder:{first}+folder:{second}+files:{second}/list.csv'
    source = open_source(spec)
    assert source.classes == ('ape', 'cat', 'dog', 'fox')
    assert [source.classes[i] for i in source.labels] == ['cat', 'fox', 'dog', 'fox', 'ape']
    read = [source.read(i) for i in range(len(source))]
    assert [content.decode() for content, _ in read] == source.names()
    assert [label for _, label in read] == source.labels == list(subset.labels(Reader(source, 3)))
    parts = [open_source(f'split:0.4/{part}:{spec}') for part in ('train', 'test')]
    assert sum(map(len, parts)) == 5
    assert all(part.classes == source.classes for part in parts)
    names = [part.name(i) for part in parts for i in range(len(part))]
    assert sorted(names) == sorted(source.name(i) for i in range(5))
    shared = overlap.shared_images(Reader(source, 3), Reader(open_source(f'folder:{first}'), 3))
    assert len(shared) == 2
    before = fingerprint(source)
    (tmp_path / 'c++').rename(tmp_path / 'd')
    moved = open_source(spec.replace('c++', 'd'))
    assert fingerprint(moved) == before
    assert fingerprint(parts[0]) != before


def test_combined_sources_need_classes_of_all(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    first = touch(tmp_path / 'a', 'cat/1.png', 'fox/2.png')
    second = touch(tmp_path / 'b', '3.png')
    source = open_source(f'folder:{first}+folder:{second}')
    assert (source.classes, source.labels) == ((), [-1, -1, -1])
    assert f'no classes, because folder:{second} has none' in capsys.readouterr().err
    with pytest.raises(errors.UserError, match='digits cannot be combined with other sources'):
        open_source(f'digits+folder:{first}')


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['1.jpg', '1.png', '2.jpg', '2.PNG'], [('*.png', 2, '1.png')]),
        (['1.tif', '1.jpeg', '2.jpeg'], [('*.tif', 1, '1.tif')]),
        (['1.png', '1_mask.png', '2.png', '2_mask.png'], [('*_mask.*', 2, '1_mask.png')]),
        (['b (1).png', 'b (1)_mask.png', 'b (1)_mask_1.png'], None),
        (['a/Imgs/1.jpg', 'a/GT/1.png', 'b/Imgs/2.jpg', 'b/GT/2.png'], [('GT', 2, 'a/GT/1.png')]),
        (['DUTS-Image/1.jpg', 'DUTS-Mask/1.png'], [('DUTS-Mask', 1, 'DUTS-Mask/1.png')]),
        # No masks: classes of people, other images of the format, names in several classes.
        (['with_mask/1.png', 'without_mask/1.png'], []),
        (['1.png', '1.jpg', '2.png', '3.png'], []),
        (['cat/1.png', 'dog/1.png', 'dog/unmasked.png'], []),
    ],
)
def test_masks_are_found_by_name(names: list[str], expected: list | None) -> None:
    found = masks.find(names)
    if expected is None:
        expected = [('*_mask.*', 1, names[1]), ('*_mask_1.*', 1, names[2])]
    assert found == expected
    for pattern, count, _ in found:
        assert len(Patterns(exclude=pattern).select(names, '')) == len(names) - count


def test_doctor_names_masks_and_how_to_leave_them_out(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((40, 40)).save(tmp_path / f'{i}.jpg')
        Image.new('L', (40, 40), 255).save(tmp_path / f'{i}.png')

    def warnings(patterns: Patterns) -> str:
        source = open_source(f'folder:{tmp_path}', '', patterns)
        run = context.Context(load('folder'), source=source, survey=survey.survey(source))
        return '\n'.join(map(str, image_checks.check_images(run)))

    assert (
        'warning  4 of 8 files have the name of another image (0.png): masks or copies, which '
        "training would use as images. Leave them out: --config.data.exclude='*.png'"
    ) in warnings(Patterns())
    assert 'masks' not in warnings(Patterns(exclude='*.png'))
