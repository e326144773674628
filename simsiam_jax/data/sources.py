"""Sources of images by index: TFDS, folders, lists, arrays, digits, and parts of these."""

import difflib
import hashlib
import os
import re
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from simsiam_jax import errors
from simsiam_jax.data import array_files, files, holdout, python_sources, tfds_source

FORMS = {
    'tfds': 'tfds:NAME/SPLIT',
    'folder': 'folder:DIR',
    'files': 'files:LIST',
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


def open_source(spec: str, data_dir: str = '') -> Source | ArraySource:
    """Opens the source that `spec` names.

    Args:
      spec: One of 'tfds:NAME/SPLIT' (SPLIT in TFDS syntax, such as 'train[:90%]');
        'folder:DIR' (searched to any depth without hidden files and folders of systems; if all
        images are in two or more subfolders of DIR, these are the classes); 'files:LIST' (a text
        file with a path per line, relative to the folder of LIST, or a .csv file of path[,label]);
        'npz:FILE.npz/SPLIT' (arrays SPLIT_images and SPLIT_labels, as MedMNIST has them, or
        'npz:FILE.npz' with images and labels); 'npy:IMAGES.npy[,LABELS.npy]'; 'digits',
        'digits/train' or 'digits/test' (scikit-learn's handwritten digits, 8x8);
        'split:0.2/test:SOURCE' (a fifth of the images of a folder, list or array, held out by
        their names) or 'split:0.2/train:SOURCE' (the others); 'python:NAME' (see python_sources).
      data_dir: Folder of TFDS data; '' uses the default of TFDS.

    Raises:
      UserError: The source does not exist or has no images.
    """
    kind, _, rest = spec.partition(':')
    if kind == 'tfds' and rest:
        return tfds_source.open_split(rest, data_dir)
    if kind == 'folder' and rest:
        return files.open_folder(rest)
    if kind == 'files' and rest:
        return files.open_list(rest)
    if kind == 'npz' and '.npz' in rest:
        return array_files.open_npz(rest)
    if kind == 'npy' and rest:
        return array_files.open_npy(rest)
    if match := re.fullmatch(r'split:(0?\.\d+)/(train|test):(.+)', spec):
        return _part(open_source(match[3], data_dir), float(match[1]), match[2], match[3])
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


def _part(source: Source | ArraySource, share: float, part: str, spec: str) -> Source | ArraySource:
    if isinstance(source, ArraySource):
        names = [str(i) for i in range(len(source))]
    elif isinstance(source, files.FileSource | array_files.ArrayFileSource):
        names = source.names()
    else:
        raise errors.UserError(
            f'{spec} cannot be split by names; expected a folder, list or array. Use the splits '
            'of TFDS: tfds:NAME/train[:80%] and tfds:NAME/train[80%:]'
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
