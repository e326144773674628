"""Tests of data/lists.py: lists and tables as spreadsheets and other programs write them."""

import pathlib

import pytest

from simsiam_jax import errors, lazy_tf
from simsiam_jax.data.patterns import Patterns
from simsiam_jax.data.sources import open_source

TABLES = {
    'comma': ('list.csv', 'path,label\na.jpg,dog\nb/c.png,cat\n'),
    'no header': ('list.csv', 'a.jpg,dog\nb/c.png,cat\n'),
    'byte order mark': ('list.csv', '\ufeffpath,label\na.jpg,dog\nb/c.png,cat\n'),
    'semicolon': ('list.csv', 'filename;class\na.jpg;dog\nb/c.png;cat\n'),
    'tab': ('list.tsv', 'image\ttarget\na.jpg\tdog\nb/c.png\tcat\n'),
    'upper case': ('LIST.CSV', 'File Name,Class\na.jpg,dog\nb/c.png,cat\n'),
    'windows': ('list.csv', 'file,label\r\na.jpg,dog\r\nb\\c.png,cat\r\n'),
    'old macintosh': ('list.csv', 'file,label\ra.jpg,dog\rb/c.png,cat\r'),
    'index of pandas': ('list.csv', ',image_path,label\n0,a.jpg,dog\n1,b/c.png,cat\n'),
    'other columns': ('list.csv', 'id,w,filename,h,target\n7,4,a.jpg,4,dog\n8,4,b/c.png,4,cat\n'),
    'label first': ('list.csv', 'label,path\ndog,a.jpg\ncat,b/c.png\n'),
    'label first, no header': ('list.csv', 'dog,a.jpg\ncat,b/c.png\n'),
    'unknown header': ('list.csv', 'picture,kind\na.jpg,dog\nb/c.png,cat\n'),
    'quoted': ('list.csv', '"path", "label"\n"a.jpg", "dog"\n"b/c.png", "cat"\n'),
    'blank lines': ('list.csv', '\npath,label\n\na.jpg,dog\n , \nb/c.png,cat\n\n'),
}


def write(folder: pathlib.Path, name: str, text: str, encoding: str = 'utf-8') -> str:
    for image in ('a.jpg', 'b/c.png'):
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).touch()
    (folder / name).write_bytes(text.encode(encoding))
    return f'files:{folder}/{name}'


def contents(source) -> list[tuple[str, str]]:
    return list(
        zip(source.names(), [source.classes[label] for label in source.labels], strict=True)
    )


@pytest.mark.parametrize(('name', 'text'), TABLES.values(), ids=TABLES)
def test_table_gives_paths_and_classes(name: str, text: str, tmp_path: pathlib.Path) -> None:
    source = open_source(write(tmp_path, name, text))
    assert contents(source) == [('a.jpg', 'dog'), ('b/c.png', 'cat')]
    assert source.paths == [f'{tmp_path}/a.jpg', f'{tmp_path}/b/c.png']


def test_table_saved_by_excel_as_unicode_text_is_read(tmp_path: pathlib.Path) -> None:
    text = 'path\tlabel\r\na.jpg\tdög\r\nb/c.png\tcat\r\n'
    source = open_source(write(tmp_path, 'list.tsv', text, 'utf-16'))
    assert contents(source) == [('a.jpg', 'dög'), ('b/c.png', 'cat')]


def test_quoted_commas_and_integers_are_read(tmp_path: pathlib.Path) -> None:
    text = 'path,label\n"a, 1.jpg",10\nb/c.png,9\nd;e.png,9\n'
    source = open_source(write(tmp_path, 'list.csv', text))
    assert contents(source) == [('a, 1.jpg', '10'), ('b/c.png', '9'), ('d;e.png', '9')]
    assert source.classes == ('10', '9')  # as text, the order of earlier versions


@pytest.mark.parametrize(
    ('query', 'classes'),
    [
        ('path=file&label=breed', ('husky', 'siam')),
        ('label=animal', ('cat', 'dog')),
        ('path=1&label=3', ('husky', 'siam')),
        ('label=Breed', ('husky', 'siam')),
    ],
)
def test_columns_are_chosen(query: str, classes: tuple, tmp_path: pathlib.Path) -> None:
    text = 'file,animal,breed\na.jpg,dog,husky\nb/c.png,cat,siam\n'
    spec = write(tmp_path, 'list.csv', text)
    source = open_source(f'{spec}?{query}')
    assert source.classes == classes
    assert source.names() == ['a.jpg', 'b/c.png']
    assert open_source(f'split:0.5/train:{spec}?{query}').classes == classes


def test_columns_without_names_are_chosen_by_number(tmp_path: pathlib.Path) -> None:
    spec = write(tmp_path, 'list.csv', '0,a.jpg,4,dog\n1,b/c.png,4,cat\n')
    assert contents(open_source(f'{spec}?label=4')) == [('a.jpg', 'dog'), ('b/c.png', 'cat')]


def test_table_with_missing_labels_has_no_classes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    source = open_source(write(tmp_path, 'list.csv', 'path,label\na.jpg,dog\nb/c.png,\n,cat\n'))
    assert source.names() == ['a.jpg', 'b/c.png']
    assert source.classes == ()
    assert (
        '1 images have no label (b/c.png), so the images have no classes' in capsys.readouterr().err
    )


def test_table_without_a_column_of_labels_says_so(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    spec = write(tmp_path, 'list.csv', 'file,animal,breed\na.jpg,dog,husky\nb/c.png,cat,siam\n')
    assert open_source(spec).classes == ()
    warning = capsys.readouterr().err
    assert 'none of the columns file, animal, breed is named label' in warning
    assert 'files:LIST.csv?label=COLUMN' in warning


def test_plain_list_of_windows_is_read(tmp_path: pathlib.Path) -> None:
    source = open_source(write(tmp_path, 'list.txt', '\ufeffa.jpg\r\nb\\c.png\r\n'))
    assert source.names() == ['a.jpg', 'b/c.png']
    assert source.classes == ()


def test_backslashes_of_names_are_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'b\\c.png').touch()
    source = open_source(write(tmp_path, 'list.txt', 'b\\c.png\n'))
    assert source.names() == ['b\\c.png']


def test_names_without_extension_are_images_if_they_exist(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'scan 1').touch()
    for name in ('list.txt', 'list.csv'):
        source = open_source(write(tmp_path, name, 'scan 1\na.jpg\n'))
        assert source.names() == ['scan 1', 'a.jpg']


def test_patterns_select_lines(tmp_path: pathlib.Path) -> None:
    spec = write(tmp_path, 'list.csv', TABLES['comma'][1])
    assert contents(open_source(spec, '', Patterns(exclude='b'))) == [('a.jpg', 'dog')]


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('l.txt', 'a.jpg 3\nb.jpg 4\n', r"is not understood: its first line is 'a\.jpg 3'"),
        ('l.txt', '# my images\na.jpg\n', r"its first line is '# my images'"),
        ('l.csv', 'id,diagnosis\n17,nevus\n', r"its first line is 'id,diagnosis'"),
        (
            'l.csv',
            'image,dx\nISIC_27,nevus\n',
            r"its first line is 'image,dx', and 'ISIC_27' is not the path of an image",
        ),
        ('l.csv', 'path,label\n', r"its first line is 'path,label'; expected one path per line"),
        ('l.csv', 'a.jpg,1,2\nb.jpg,1,2\n', r"3 columns without names; .* 'a\.jpg,1,2'\. Choose"),
        (
            'l.csv',
            'path,label\na.jpg,dog\nb.jpg\n',
            r"line 3 has 1 fields; expected 2, .*'path,lab",
        ),
        ('l.csv?label=x', 'path,label\na.jpg,1\n', r"no column 'x'; expected path, label"),
        ('l.csv?label=3', 'a.jpg,1\n', r"no column '3'; expected 1 to 2"),
        ('l.csv?label=1&sep=x', 'a.jpg,1\n', r'has option sep; expected path=COLUMN or label='),
        ('l.csv', '', r'is empty; expected one path per line'),
    ],
)
def test_list_that_is_not_understood_is_refused(
    name: str, text: str, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name.partition('?')[0]).write_text(text)
    with pytest.raises(errors.UserError, match=message) as raised:
        open_source(f'files:{tmp_path}/{name}')
    assert '\n' not in str(raised.value)


def test_remote_table_is_read() -> None:
    tf = lazy_tf.load()
    tf.io.gfile.makedirs('ram://tables')
    with tf.io.gfile.GFile('ram://tables/list.CSV', 'w') as file:
        file.write('label;file\ncat;x/1\ndog;y/2.png\n')
    source = open_source('files:ram://tables/list.CSV')
    assert source.paths == ['ram://tables/x/1', 'ram://tables/y/2.png']
    assert source.classes == ('cat', 'dog')
