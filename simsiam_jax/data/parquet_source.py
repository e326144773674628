"""Images in Parquet files, as Hugging Face's datasets have them."""

import dataclasses
import functools
import json
import os
import re
import urllib.parse
from typing import Any

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors, paths
from simsiam_jax.data import class_names
from simsiam_jax.data.archives import find_files
from simsiam_jax.data.patterns import ALL, Patterns

_MEMORY = 2**32  # bytes of images to keep in memory
_SLOW = 2**22  # bytes of a group of rows above which reading it takes longer than decoding an image
_IMAGES = ('image', 'img', 'images', 'picture', 'photo')
_LABELS = ('label', 'labels', 'class', 'target')


class _Column:
    """The encoded images in a column of several files.

    Parquet compresses groups of rows, so that reading one image reads its whole group. The groups
    that were read last stay in memory.

    Args:
      files: The files.
      path: Column, with the field for a structure: 'image.bytes'.
    """

    def __init__(self, files: list[str], path: str):
        import pyarrow.parquet as pq

        self._files, self._path = files, path
        self._metadata = [pq.read_metadata(file) for file in files]
        self.counts = [metadata.num_rows for metadata in self._metadata]
        self._groups = [
            (n, i) for n, m in enumerate(self._metadata) for i in range(m.num_row_groups)
        ]
        groups = [self._metadata[n].row_group(i) for n, i in self._groups]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.sizes = [group.total_byte_size for group in groups]
        kept = int(_MEMORY / max(np.mean(self.sizes), 1))
        self._group = functools.lru_cache(max(kept, 1))(self._read_group)

    def read(self, row: int) -> bytes:
        """Returns the encoded image; may be called from many threads."""
        group = int(np.searchsorted(self._starts, row, 'right')) - 1
        content = self._group(group)[int(row - self._starts[group])].as_py()
        if content is None:
            raise ValueError('the row has no bytes of an image')
        return content

    def _read_group(self, group: int) -> Any:
        import pyarrow.parquet as pq

        number, position = self._groups[group]
        with pq.ParquetFile(self._files[number], metadata=self._metadata[number]) as file:
            table = file.read_row_group(position, [self._path], use_threads=False)
        if '.' in self._path:
            table = table.flatten()
        return table.column(0).combine_chunks()


@dataclasses.dataclass
class ParquetSource:
    """Images of Parquet files, each with a label or -1.

    Attributes:
      column: The encoded images.
      rows: Row of each image.
      all_names: Name of the image in every row.
      labels: Label of each image, -1 without labels.
      classes: Names of the classes; empty without labels.
    """

    column: _Column
    rows: Int[np.ndarray, 'n']
    all_names: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Returns the names of the images and the sizes of the groups of rows."""
        return '\0'.join([*self.names(), *map(str, self.column.sizes)])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.column.read(int(self.rows[index])), self.labels[index]

    def name(self, index: int) -> str:
        return self.all_names[self.rows[index]]

    def names(self) -> list[str]:
        """Returns the paths that the files store, or else file and row."""
        return [self.all_names[row] for row in self.rows]

    def take(self, indices: Int[np.ndarray, 'n']) -> 'ParquetSource':
        """Returns the images at some indices, with all classes."""
        labels = [self.labels[i] for i in indices]
        return dataclasses.replace(self, rows=self.rows[indices], labels=labels)


def open_parquet(spec: str, patterns: Patterns = ALL) -> ParquetSource:
    """Opens FILE.parquet, or several by wildcards or a range {000..099}, on a disk.

    The images are encoded: a column of bytes, or of bytes and path as in Hugging Face's datasets.
    The labels are a column of Hugging Face's type ClassLabel or named label, of integers or text.
    'FILE.parquet?image=COLUMN&label=COLUMN' chooses others.

    Args:
      spec: Files, with the columns to use.
      patterns: Images to use, by their names.

    Raises:
      UserError: The files are missing or damaged, or have no such columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    match = re.fullmatch(r'(.+?)\?((?:image|label)=.*)', spec)
    files = find_files(match[1] if match else spec)
    given = dict(urllib.parse.parse_qsl(match[2])) if match else {}
    try:
        schema = pq.read_schema(files[0])
        image, label, classes = _columns(schema, given, files[0])
        has_paths = pa.types.is_struct(schema.field(image).type)
        column = _Column(files, f'{image}.bytes' if has_paths else image)
        wanted = [f'{image}.path'] * has_paths + [label] * bool(label)
        tables = [pq.ParquetFile(file).read(wanted).flatten() for file in files]
    except (OSError, pa.ArrowException) as error:
        raise errors.UserError(
            f'Parquet files {spec} cannot be read: {errors.reason(error)}; expected Parquet files '
            'with the same columns'
        ) from error
    names = [
        f'{os.path.basename(file)}:{row}'
        for file, count in zip(files, column.counts, strict=True)
        for row in range(count)
    ]
    stored = [name for table in tables for name in table.column(0).to_pylist()] if has_paths else []
    if stored and None not in stored:
        names = list(map(paths.printable, stored))
    if not names:
        raise errors.UserError(f'Parquet files {spec} have no rows; expected at least one image')
    labels = class_names.unlabeled(len(names))
    if label:
        values = [value for table in tables for value in table.column(label).to_pylist()]
        labels = class_names.of_values(values, classes, spec)
    source = ParquetSource(column, np.arange(len(names)), names, *labels)
    total, largest = sum(column.sizes), max(column.sizes)
    if total > _MEMORY and largest > _SLOW:
        errors.warn_once(
            f'Parquet files {spec} have {total / 2**30:.1f} GiB in groups of rows of up to '
            f'{largest / 2**20:.0f} MiB: reading one image reads its whole group. Write them again '
            'with small groups: pyarrow.parquet.write_table(pyarrow.parquet.read_table(OLD), NEW, '
            'row_group_size=16)'
        )
    return source.take(patterns.select(names, spec)) if patterns else source


def _columns(schema: Any, given: dict[str, str], file: str) -> tuple[str, str, tuple[str, ...]]:
    """Returns the columns of images and labels, '' without labels, and the classes if stored."""
    import pyarrow as pa

    def has_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index('bytes') >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    if unknown := [name for name in given.values() if name not in schema.names]:
        raise errors.UserError(
            f'{file} has no column {unknown[0]!r}; expected one of {", ".join(schema.names)}'
        )
    images = [field.name for field in schema if has_images(field.type)]
    image = given.get('image') or next((n for n in _IMAGES if n in images), *images[:1] or [''])
    if image not in images:
        raise errors.UserError(
            f'{file} has no column of encoded images; its columns are {", ".join(schema.names)}. '
            'Store the bytes of the files of images'
        )
    metadata = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
    features = metadata.get('info', {}).get('features', {})
    named = {n: f['names'] for n, f in features.items() if 'names' in f and '_type' in f}
    candidates = [n for n in (*_LABELS, *named) if n in schema.names and n != image]
    label = given.get('label') or next(iter(candidates), '')
    return image, label, tuple(named.get(label, ()))
