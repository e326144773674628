"""Sources of images, all by index: tfds:NAME/SPLIT, folder:DIR, files:LIST and digits."""

import contextlib
import difflib
import os
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from simsiam_jax import errors, tensorflow

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')
FORMS = {
    'tfds': 'tfds:NAME/SPLIT',
    'folder': 'folder:DIR',
    'files': 'files:LIST',
    'digits': 'digits',
    'digits/train': 'digits/train',
    'digits/test': 'digits/test',
}


@runtime_checkable
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
        to any depth, hidden files left out; where all images lie in two or more subfolders of
        DIR, these are the classes), 'files:LIST' (a text file, one path a line, relative to its
        folder) or 'digits', 'digits/train', 'digits/test' (scikit-learn's handwritten digits,
        8x8).
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
    if kind in FORMS:
        hint = f'expected {FORMS[kind]}'
    elif spec and pathlib.Path(spec).is_dir():
        hint = f'did you mean folder:{spec}?'
    elif close := difflib.get_close_matches(kind, FORMS, n=1):
        hint = f'did you mean {FORMS[close[0]]}?'
    else:
        hint = f'expected one of {", ".join(FORMS.values())}'
    raise errors.UserError(f'source is {spec!r}; {hint}')


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
    try:
        paths = sorted(_walk(os.fspath(root)))
    except OSError as error:
        raise errors.UserError(f'image folder {root} cannot be read: {error}') from error
    if not paths:
        raise errors.UserError(
            f'image folder {root} holds no images; expected {", ".join(EXTENSIONS)} at any depth'
        )
    below = len(os.path.join(root, ''))
    tops = [path[below:].rpartition(os.sep)[0].partition(os.sep)[0] for path in paths]
    classes = tuple(sorted(set(tops)))
    # One subfolder names no classes, and images beside the subfolders belong to none of them.
    if len(classes) < 2 or '' in classes:
        return FileSource(paths, [-1] * len(paths), ())
    number = {name: i for i, name in enumerate(classes)}
    return FileSource(paths, [number[top] for top in tops], classes)


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The images at any depth; links are followed, but not round in a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, real))
            elif entry.name.lower().endswith(EXTENSIONS):
                yield entry.path


def _files(path: pathlib.Path) -> FileSource:
    if not path.is_file():
        raise errors.UserError(f'list of images {path} does not exist or is not a file')
    try:
        lines = [line.strip() for line in path.read_text('utf-8').splitlines()]
    except UnicodeDecodeError as error:
        raise errors.UserError(
            f'list of images {path} is not text; expected one path a line'
        ) from error
    paths = [str(path.parent / line) for line in lines if line]
    if not paths:
        raise errors.UserError(f'list of images {path} is empty; expected one path a line')
    return FileSource(paths, [-1] * len(paths), ())


def _tfds(spec: str, data_dir: str) -> TfdsSource:
    name, _, split = spec.rpartition('/')
    if not name or not split:
        raise errors.UserError(f'source is tfds:{spec}; expected {FORMS["tfds"]}')
    tensorflow.load()
    with _one_line('TFDS cannot be imported'):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader
    builder = _builder(tfds, name, data_dir)
    # Ten retries, its own number, take over three minutes to say that there is no network.
    downloader.MAX_RETRIES = 3
    with _one_line(f'TFDS could not prepare {name} in {builder.data_dir}'):
        builder.download_and_prepare(
            file_format='array_record',
            # What TFDS hosts ready-made is TFRecord.
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if 'array_record' not in formats:
        raise errors.UserError(
            f'{builder.data_dir} holds {", ".join(formats)} files, which cannot be read by index; '
            'convert them (pip install apache-beam mlcroissant; tfds convert_format '
            f'--dataset_version_dir={builder.data_dir} --out_file_format=array_record) or set '
            'config.data.tfds_data_dir to a folder where TFDS may prepare the data anew'
        )
    features = dict(builder.info.features.items())
    if not isinstance(features.get('image'), tfds.features.Image):
        raise errors.UserError(
            f'TFDS dataset {name} has no feature image; its features are {", ".join(features)}'
        )
    with _one_line(f'source is tfds:{spec}'):
        if not builder.info.splits[split].num_examples:
            raise ValueError('the split is empty')
        decoders = {'image': tfds.decode.SkipDecoding()}
        data = builder.as_data_source(split, decoders=decoders, file_format='array_record')
    label = features.get('label')
    classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    return TfdsSource(data, classes, f'tfds:{spec}')


def _builder(tfds: Any, name: str, data_dir: str) -> Any:
    with _one_line(f'TFDS cannot open {name}'):
        try:
            # No file_format here: TFDS then rejects data converted to array_record afterwards.
            return tfds.builder(name, data_dir=data_dir or None)
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(name.partition('/')[0], known, n=1)
            hint = f'did you mean {close[0]}?' if close else 'tfds.list_builders() lists its names'
            raise errors.UserError(f'TFDS knows no dataset {name}; {hint}') from None


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns any error into a UserError: TFDS and its builders fail in too many ways to list."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 500) or type(error).__name__
        raise errors.UserError(f'{what}: {reason}') from error
