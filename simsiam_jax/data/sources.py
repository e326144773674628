"""Sources of images by index: TFDS, folders, lists, arrays, digits, and parts of these."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from simsiam_jax import errors
from simsiam_jax.data import (
    archives,
    array_files,
    files,
    holdout,
    lists,
    parquet_source,
    python_sources,
    tfds_source,
)
from simsiam_jax.data.listed import JoinedSource, Listed
from simsiam_jax.data.patterns import ALL, Patterns

FORMS = {
    'tfds': 'tfds:NAME/SPLIT',
    'folder': 'folder:DIR',
    'files': 'files:LIST',
    'zip': 'zip:FILE.zip',
    'tar': 'tar:FILE.tar',
    'parquet': 'parquet:FILE.parquet',
    'npz': 'npz:FILE.npz/SPLIT',
    'npy': 'npy:IMAGES.npy[,LABELS.npy]',
    'digits': 'digits',
    'digits/train': 'digits/train',
    'digits/test': 'digits/test',
    'split': 'split:SHARE/train:SOURCE or split:SHARE/test:SOURCE',
}


@runtime_checkable
class Identified(Protocol):
    """A number of images, and text that is the same for the same images in the same order."""

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...


@runtime_checkable
class Source(Protocol):
    """Encoded images by index.

    Attributes:
      classes: Names of the classes; empty without labels.
      identity: Text that is the same for the same images in the same order, wherever they are.
    """

    classes: tuple[str, ...]

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and its label, -1 without labels."""

    def name(self, index: int) -> str:
        """Returns the name of the image for messages."""


class ArraySource:
    """Images in memory.

    Args:
      images: All images, uint8.
      labels: Label of each image, -1 without labels.
      classes: Names of the classes; empty without labels.
      identity: See Source.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, 'N H W C'],
        labels: Int[np.ndarray, 'N'],
        classes: tuple,
        identity: str = '',
    ):
        self.images, self.labels, self.classes = images, labels, classes
        self.identity = identity

    def __len__(self) -> int:
        return len(self.images)


# Kinds that data.include and data.exclude apply to.
_OPENERS: dict[str, Callable[[str, Patterns], Source]] = {
    'files': lists.open_list,
    'zip': archives.open_archives,
    'tar': archives.open_archives,
    'parquet': parquet_source.open_parquet,
}


def open_source(
    spec: str,
    data_dir: str = '',
    patterns: Patterns = ALL,
    list_folder: Callable[[str], list[str]] = files.list_folder,
) -> Source | ArraySource:
    """Opens the source that `spec` names.

    Args:
      spec: One of 'tfds:NAME/SPLIT' (SPLIT in TFDS syntax, such as 'train[:90%]');
        'folder:DIR' (searched to any depth without hidden files and folders of systems; if all
        images are in two or more subfolders of DIR, these are the classes; DIR may have wildcards);
        'files:LIST' (a text file with a path per line, relative to the folder of LIST, or a table;
        see lists.open_list); 'zip:FILE' or 'tar:FILE' (see archives.open_archives);
        'parquet:FILE' (see parquet_source.open_parquet);
        'npz:FILE.npz/SPLIT' (arrays SPLIT_images and SPLIT_labels, as MedMNIST has them, or
        'npz:FILE.npz' with images and labels); 'npy:IMAGES.npy[,LABELS.npy]'; 'digits',
        'digits/train' or 'digits/test' (scikit-learn's handwritten digits, 8x8);
        'split:0.2/test:SOURCE' (a fifth of the images of a folder, list or array, held out by
        their names) or 'split:0.2/train:SOURCE' (the others); 'SOURCE+SOURCE' (the images of
        both, if neither is of TFDS or digits); 'python:NAME' (see python_sources).
      data_dir: Folder of TFDS data; '' uses the default of TFDS.
      patterns: Files to use, of folders, lists, archives and Parquet files.
      list_folder: Function that lists the images below a folder or URL.

    Raises:
      UserError: The source does not exist or has no images.
    """
    kind, _, rest = spec.partition(':')
    if match := re.fullmatch(r'split:(0?\.\d+)/(train|test):(.+)', spec):
        whole = open_source(match[3], data_dir, patterns, list_folder)
        return _part(whole, float(match[1]), match[2], match[3])
    parts = re.split(rf'\+(?=(?:{"|".join(FORMS)}):)', spec)
    if len(parts) > 1:
        opened = [open_source(part, data_dir, patterns, list_folder) for part in parts]
        return _joined(parts, opened)
    if kind == 'folder' and rest:
        return files.open_folder(rest, patterns, list_folder)
    if kind in _OPENERS and rest:
        return _OPENERS[kind](rest, patterns)
    if patterns:
        errors.warn_once(f'config.data.include and config.data.exclude do not apply to {spec}')
    if kind == 'tfds' and rest:
        return tfds_source.open_split(rest, data_dir)
    if kind == 'npz' and '.npz' in rest:
        return array_files.open_npz(rest)
    if kind == 'npy' and rest:
        return array_files.open_npy(rest)
    if kind == python_sources.KIND:
        return python_sources.find(rest)
    if spec in ('digits', 'digits/train', 'digits/test'):
        return _digits(spec.removeprefix('digits').lstrip('/'))
    if kind in FORMS:
        hint = f'expected {FORMS[kind]}'
    elif spec and os.path.isdir(os.path.expanduser(spec)):
        hint = f'did you mean folder:{spec}?'
    elif close := difflib.get_close_matches(kind, FORMS, n=1):
        hint = f'did you mean {FORMS[close[0]]}?'
    else:
        hint = f'expected one of {", ".join(FORMS.values())}'
    raise errors.UserError(f'source is {spec!r}; {hint}')


def fingerprint(source: Identified) -> dict[str, Any]:
    """Returns count and digest of the images' names in order, without the folder they are in."""
    digest = hashlib.sha256(source.identity.encode('utf-8', 'surrogateescape')).hexdigest()
    return {'count': len(source), 'digest': digest}


def image_names(source: Identified) -> list[str]:
    """Returns the names that identify the images; [] if a digest of their pixels does."""
    # Parts of a labeled set end with a digest; joined sources and Parquet add signs and numbers.
    identity = re.sub(r' at [0-9a-f]{64}$', '', source.identity)
    names = [name for name in identity.split('\0') if name != '+' and not name.isdigit()]
    return names if len(names) > 1 else []


def _joined(specs: list[str], parts: list[Source | ArraySource]) -> JoinedSource:
    for spec, part in zip(specs, parts, strict=True):
        if not isinstance(part, Listed):
            raise errors.UserError(
                f'{spec} cannot be combined with other sources; expected a folder, list, archive, '
                'Parquet file or array'
            )
    return JoinedSource(parts, specs)


def _part(source: Source | ArraySource, share: float, part: str, spec: str) -> Source | ArraySource:
    if isinstance(source, ArraySource):
        names = [str(i) for i in range(len(source))]
    elif isinstance(source, Listed):
        names = source.names()
    else:
        raise errors.UserError(
            f'{spec} cannot be split by names; expected a folder, list, archive or array. Use the '
            'splits of TFDS: tfds:NAME/train[:80%] and tfds:NAME/train[80%:]'
        )
    labels = np.asarray(source.labels)
    held = holdout.choose(names, labels, source.classes, share)
    chosen = np.flatnonzero(held == (part == 'test'))
    if not len(chosen):
        raise errors.UserError(f'no image of {spec} is in the {part} part of a split of {share}')
    if isinstance(source, ArraySource):
        identity = f'{source.identity} split {share} {part}'
        return ArraySource(source.images[chosen], labels[chosen], source.classes, identity)
    return source.take(chosen)


def _digits(split: str) -> ArraySource:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int32)
    test = np.arange(len(images)) % 5 == 0  # the held-out fifth
    chosen = {'train': ~test, 'test': test}.get(split, np.ones_like(test))
    classes = tuple(str(d) for d in range(10))
    return ArraySource(images[chosen], labels[chosen], classes, f'digits/{split}')
