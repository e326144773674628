"""Sources of images, all by index: tfds:NAME/SPLIT, folder:DIR, files:LIST and digits."""

import os
import pathlib
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from simsiam_jax import errors, tensorflow

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')


class Source(Protocol):
    """Encoded images by index.

    Attributes:
      classes: names of the classes; empty where the images have no labels.
    """

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label, -1 where there is none."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class ArraySource:
    """Images held in memory."""

    def __init__(
        self, images: UInt8[np.ndarray, 'N H W C'], labels: Int[np.ndarray, 'N'], classes: tuple
    ):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)


class FileSource:
    """Image files; a label each, or -1."""

    def __init__(self, paths: list[str], labels: list[int], classes: tuple[str, ...]):
        self.paths, self.labels, self.classes = paths, labels, classes

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[bytes, int]:
        return pathlib.Path(self.paths[index]).read_bytes(), self.labels[index]

    def name(self, index: int) -> str:
        return self.paths[index]


class TfdsSource:
    """A split of a TFDS dataset in array_record files, which can be read by index."""

    def __init__(self, data: Any, classes: tuple[str, ...], name: str):
        self.data, self.classes, self._name = data, classes, name

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[bytes, int]:
        record = self.data[int(index)]
        return record['image'], int(record['label']) if self.classes else -1

    def name(self, index: int) -> str:
        return f'{self._name}[{index}]'


def open_source(spec: str, data_dir: str = '') -> Source | ArraySource:
    """The source that `spec` names.

    Args:
      spec: 'tfds:NAME/SPLIT' (SPLIT as TFDS writes it, 'train[:90%]'), 'folder:DIR' (searched
        to any depth; where all images lie in subfolders of DIR, these are the classes),
        'files:LIST' (a text file, one path a line, relative to its folder) or 'digits',
        'digits/train', 'digits/test' (scikit-learn's handwritten digits, 8x8).
      data_dir: where TFDS keeps its data; '' is its default.

    Raises:
      UserError: there is no such source, or it has no images.
    """
    kind, _, rest = spec.partition(':')
    if kind == 'tfds' and rest:
        return _tfds(rest, data_dir)
    if kind == 'folder' and rest:
        return _folder(pathlib.Path(rest).expanduser())
    if kind == 'files' and rest:
        return _files(pathlib.Path(rest).expanduser())
    if spec in ('digits', 'digits/train', 'digits/test'):
        return _digits(spec.removeprefix('digits').lstrip('/'))
    raise errors.UserError(
        f'source is {spec!r}; expected tfds:NAME/SPLIT, folder:DIR, files:LIST, digits, '
        'digits/train or digits/test'
    )


def _digits(split: str) -> ArraySource:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int32)
    test = np.arange(len(images)) % 5 == 0  # the held-out fifth
    chosen = {'train': ~test, 'test': test}.get(split, np.ones_like(test))
    return ArraySource(images[chosen], labels[chosen], tuple(str(d) for d in range(10)))


def _folder(root: pathlib.Path) -> FileSource:
    if not root.is_dir():
        raise errors.UserError(f'image folder {root} does not exist or is not a folder')
    paths = sorted(
        os.path.join(folder, file)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS)
    )
    if not paths:
        raise errors.UserError(
            f'image folder {root} holds no images; expected {", ".join(EXTENSIONS)} at any depth'
        )
    parents = [pathlib.Path(path).relative_to(root).parts[:-1] for path in paths]
    if not all(parents):  # images beside the subfolders: these are no classes
        return FileSource(paths, [-1] * len(paths), ())
    classes = tuple(sorted({parts[0] for parts in parents}))
    number = {name: i for i, name in enumerate(classes)}
    return FileSource(paths, [number[parts[0]] for parts in parents], classes)


def _files(path: pathlib.Path) -> FileSource:
    if not path.is_file():
        raise errors.UserError(f'list of images {path} does not exist or is not a file')
    lines = [line.strip() for line in path.read_text().splitlines()]
    paths = [str(path.parent / line) for line in lines if line]
    if not paths:
        raise errors.UserError(f'list of images {path} is empty; expected one path a line')
    return FileSource(paths, [-1] * len(paths), ())


def _tfds(spec: str, data_dir: str) -> TfdsSource:
    name, _, split = spec.rpartition('/')
    if not name:
        raise errors.UserError(f'source is tfds:{spec!r}; expected tfds:NAME/SPLIT')
    tensorflow.load()
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format='array_record')
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders()
        raise errors.UserError(
            f'TFDS knows no dataset {name!r}; {errors.suggestion(name, known)}'
            if len(known) < 20
            else f'TFDS knows no dataset {name!r}; tfds.list_builders() lists its names'
        ) from None
    try:
        builder.download_and_prepare(file_format='array_record')
    except (AssertionError, tfds.download.DownloadError, OSError) as error:
        raise errors.UserError(
            f'TFDS could not prepare {name!r} in {builder.data_dir}: {str(error).splitlines()[0]}'
        ) from error
    features = builder.info.features
    decoders = {'image': tfds.decode.SkipDecoding()}
    data = builder.as_data_source(split, decoders=decoders)
    classes = tuple(features['label'].names) if 'label' in features else ()
    return TfdsSource(data, classes, f'tfds:{spec}')
