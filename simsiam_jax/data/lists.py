"""Lists of image files: text with a path per line, and tables (.csv, .tsv) with labels."""

import csv
import io
import os
import re
import urllib.parse
from collections.abc import Sequence

from simsiam_jax import errors
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import class_names, image_files
from simsiam_jax.data.files import FileSource, is_remote, read_file
from simsiam_jax.data.patterns import ALL, Patterns

# Names of columns, without case, blanks, - and _; of two in a table the first here is used.
_PATHS = ('path', 'filename', 'filepath', 'file', 'imagepath', 'image', 'img', 'imagename')
_LABELS = ('label', 'class', 'target', 'labels', 'category', 'classname', 'labelname')

Row = tuple[int, list[str]]  # number of the line and its cells


def open_list(spec: str, patterns: Patterns = ALL) -> FileSource:
    """Opens the images of a list: one path per line, or a .csv or .tsv table with a column of them.

    Tables have commas, semicolons or tabs. Names of columns in the first line may be 'path' or
    'filename' and 'label' or 'class', or similar, among any others. Without names, a table has the
    paths, and perhaps the labels. 'LIST.csv?path=COLUMN&label=COLUMN' chooses columns by name, or
    by number from 1. Paths are relative to the list's folder.

    Args:
      spec: The list, with the columns to use.
      patterns: Images to use.

    Raises:
      UserError: The list is missing, empty or malformed.
    """
    match = re.fullmatch(r'(.+?)\?((?:path|label)=.*)', spec)
    path = paths_lib.expand(match[1] if match else spec)
    columns = dict(urllib.parse.parse_qsl(match[2], keep_blank_values=True)) if match else {}
    if unknown := columns.keys() - {'path', 'label'}:
        raise errors.UserError(
            f'list of images {spec} has option {min(unknown)}; expected path=COLUMN or label=COLUMN'
        )
    text = _text(path)
    is_table = path.lower().endswith(('.csv', '.tsv'))
    rows = _table(path, text) if is_table else _lines(text)
    if not rows:
        raise errors.UserError(f'list of images {path} is empty; expected one path per line')
    names, labels = _columns(path, rows, columns, has_header=is_table and _has_header(path, rows))
    folder = os.path.dirname(path)
    if not is_remote(path):
        names = _without_backslashes(names, folder)
    if patterns:
        chosen = patterns.select(names, path)
        names = [names[i] for i in chosen]
        labels = labels and [labels[i] for i in chosen]
    full = [name if is_remote(name) else os.path.join(folder, name) for name in names]
    if labels is None:
        return FileSource(full, *class_names.unlabeled(len(full)), folder)
    return FileSource(full, *class_names.number(labels, path), folder)


def _text(path: str) -> str:
    if not is_remote(path) and not paths_lib.is_file(path):
        raise errors.UserError(f'list of images {path} does not exist or is not a file')
    try:
        content = read_file(path)
    except OSError as error:
        raise errors.UserError(f'list of images {path} cannot be read: {error}') from error
    wide = content[:2] in (b'\xff\xfe', b'\xfe\xff')  # tables saved as Unicode text by Excel
    # As Python reads names of files: bytes that are not UTF-8 become surrogates.
    text = content.decode(*(['utf-16', 'replace'] if wide else ['utf-8-sig', 'surrogateescape']))
    if '\0' in text:
        raise errors.UserError(f'list of images {path} is not text; expected one path per line')
    return text


def _lines(text: str) -> list[Row]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, [line]) for number, line in lines if line]


def _table(path: str, text: str) -> list[Row]:
    """Returns the rows of a table, split at the separator that gives all rows the same width."""
    best: list[Row] = []
    for separator in ',;\t':
        reader = csv.reader(
            io.StringIO(text, newline=''), delimiter=separator, skipinitialspace=True
        )
        try:
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            raise errors.UserError(
                f'list of images {path} cannot be read: line {reader.line_num}: {error}'
            ) from error
        rows = [row for row in rows if any(row[1])]
        widths = {len(cells) for _, cells in rows}
        if len(widths) == 1 and widths != {1}:
            return rows
        if rows and (not best or len(rows[0][1]) > len(best[0][1])):
            best = rows
    return best


def _columns(
    path: str, rows: list[Row], given: dict[str, str], *, has_header: bool
) -> tuple[list[str], list[str] | None]:
    """Returns the paths and the labels, None without labels."""
    first, second = (row[1] for row in [*rows, rows[0]][:2])
    header = [_key(cell) for cell in first] if has_header else []
    width = len(first)
    for line, cells in rows:
        if len(cells) != width:
            raise errors.UserError(
                f'list of images {path}: line {line} has {len(cells)} fields; expected {width}, as '
                f'in its first line {_shown(first)}'
            )
    example = second if header else first
    chosen = {key: _position(path, first, header, value) for key, value in given.items()}
    images = [i for i, cell in enumerate(example) if _is_image(cell)]
    named = [header.index(name) for name in _PATHS if name in header]
    candidates = [i for i in named if i in images] or named or images or [0]
    at = chosen.get('path', candidates[0])
    label = chosen['label'] if 'label' in chosen else _label(path, first, header, at)
    data = [cells for _, cells in (rows[1:] if header else rows) if cells[at]]
    folder = os.path.dirname(path)
    # Files without an extension may be images, too.
    if not data or not (_is_image(data[0][at]) or _exists(os.path.join(folder, data[0][at]))):
        raise errors.UserError(
            f'list of images {path} is not understood: its first line is {_shown(first)}'
            + (f', and {data[0][at]!r} is not the path of an image' if header and data else '')
            + '; expected one path per line, or a .csv file of path,label. To choose columns of a '
            '.csv file, use files:LIST.csv?path=COLUMN&label=COLUMN'
        )
    names = [cells[at] for cells in data]
    if label is None:
        return names, None
    labels = [cells[label] for cells in data]
    if '' in labels:
        errors.warn_once(
            f'list of images {path}: {labels.count(""):,} images have no label '
            f'({names[labels.index("")]}), so the images have no classes. Add the labels'
        )
    return names, None if '' in labels else labels


def _has_header(path: str, rows: list[Row]) -> bool:
    """Returns whether the first row names columns: only the rows after it are images."""
    first, second = (row[1] for row in [*rows, rows[0]][:2])
    folder = os.path.dirname(path)
    if any(_is_image(cell) or paths_lib.is_file(os.path.join(folder, cell)) for cell in first):
        return False
    return any(_key(cell) in _PATHS for cell in first) or any(map(_is_image, second))


def _label(path: str, first: list[str], header: list[str], at: int) -> int | None:
    """Returns the column of the labels; None if there is none."""
    others = [i for i in range(len(first)) if i != at]
    named = [header.index(name) for name in _LABELS if name in header]
    if named or len(others) < 2:
        return next((i for i in (*named, *others) if i != at), None)
    if not header:
        raise errors.UserError(
            f'list of images {path} has {len(first)} columns without names; its first line is '
            f'{_shown(first)}. Choose two by number: files:LIST.csv?path=1&label=2'
        )
    errors.warn_once(
        f'list of images {path}: none of the columns {", ".join(first)} is named label, so the '
        'images have no classes. To choose a column, use files:LIST.csv?label=COLUMN'
    )
    return None


def _position(path: str, first: list[str], header: list[str], column: str) -> int:
    if _key(column) in header:
        return header.index(_key(column))
    if column.isdigit() and 0 < int(column) <= len(first):
        return int(column) - 1
    known = ', '.join(first) if header else f'1 to {len(first)}'
    raise errors.UserError(f'list of images {path} has no column {column!r}; expected {known}')


def _key(name: str) -> str:
    return re.sub(r'[\s_-]', '', name.casefold())


def _is_image(cell: str) -> bool:
    kind = image_files.extension(cell)
    return kind in image_files.EXTENSIONS or kind in image_files.EXTRAS


def _exists(path: str) -> bool:
    return is_remote(path) or paths_lib.is_file(path)


def _shown(cells: Sequence[str]) -> str:
    return repr(paths_lib.printable(','.join(cells))[:100])


def _without_backslashes(names: list[str], folder: str) -> list[str]:
    """Returns the paths with / for the \\ of Windows, unless files are named with \\."""
    windows = next((name for name in names if '\\' in name), '')
    if not windows or paths_lib.is_file(os.path.join(folder, windows)):
        return names
    return [name.replace('\\', '/') for name in names]
