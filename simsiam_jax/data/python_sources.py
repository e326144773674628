"""Images that a Python program gives: arrays, lists, and data sets of other libraries."""

import contextlib
import contextvars
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from simsiam_jax import errors, paths
from simsiam_jax.data import array_files
from simsiam_jax.data.array_files import ArrayFileSource
from simsiam_jax.data.files import FileSource, read_file

KIND = 'python'  # of the specs python:NAME

_given: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar('given')


@contextlib.contextmanager
def provide(**sources: FileSource | ArrayFileSource) -> Iterator[None]:
    """Lets sources.open_source open python:NAME within this context.

    Args:
      **sources: Sources by name.
    """
    token = _given.set({**_given.get({}), **sources})
    try:
        yield
    finally:
        _given.reset(token)


def find(name: str) -> Any:
    """Returns the source python:NAME.

    Raises:
      UserError: The program does not provide it now.
    """
    given = _given.get({})
    if name not in given:
        raise errors.UserError(
            f'source is {KIND}:{name}, images that were given to a function of simsiam_jax; '
            'expected images that exist here. Call the function again, or set another source'
        )
    return given[name]


def open_images(
    images: Any, labels: Any = None, classes: Sequence[str] = (), name: str = 'images'
) -> FileSource | ArrayFileSource:
    """Returns a source of images in Python.

    Args:
      images: uint8 array [N, H, W, C] or [N, H, W]; or a list, or any object with __len__ and
        __getitem__, such as a data set of PyTorch, Hugging Face or Grain. Its items are arrays
        [H, W, C] or [H, W], PIL images, encoded bytes, paths, PyTorch tensors [C, H, W], tuples
        that begin with an image, or mappings with the key 'image' or 'img'. It is read from several
        threads.
      labels: Class of each image, whole numbers or names; None if there are none.
      classes: Names of the classes; () uses those of `labels`.
      name: Name of the images in messages.

    Raises:
      UserError: These are no images, or the labels do not fit them.
    """
    if hasattr(images, '__array__') and hasattr(images, 'shape'):
        array = np.asarray(images)
        return array_files.from_arrays(array, *_numbers(labels, classes), name)
    if isinstance(images, str | bytes | Mapping) or not (
        hasattr(images, '__len__') and hasattr(images, '__getitem__')
    ):
        raise errors.UserError(
            f'{name} is a {type(images).__name__}; expected a uint8 array [N, H, W, C], a list, an '
            'object with __len__ and __getitem__, or a source such as folder:DIR'
        )
    if not len(images):
        raise errors.UserError(f'{name} is empty; expected at least one image')
    numbers, classes = _numbers(labels, classes)
    numbers, classes = array_files.check_labels(numbers, len(images), classes, name)
    if all(isinstance(image, str | os.PathLike) for image in _ends(images)):
        files = [paths.expand(path) for path in images]
        return FileSource(files, numbers.tolist(), classes)
    return ObjectSource(images, numbers, classes, name)


class ObjectSource(ArrayFileSource):
    """Images of an object with __len__ and __getitem__, which `images` of ArrayFileSource is."""

    @property
    def identity(self) -> str:
        """Returns a digest of the images' number, and of the encoded bytes of some."""
        digest = hashlib.sha256(str(len(self)).encode())
        for i in self._sampled():
            digest.update(self.read(int(i))[0])
        return digest.hexdigest()

    def read(self, index: int) -> tuple[bytes, int]:
        item = self._images[int(self._indices[index])]
        return _encode(item), int(self.labels[index])


def _ends(images: Any) -> list[Any]:
    """Returns the first and the last item, which show what a list has."""
    return [images[0], images[len(images) - 1]]


def _numbers(labels: Any, classes: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Returns labels as numbers, and the names of the classes if the labels are names."""
    if labels is None:
        return None, ()
    labels = np.asarray(labels)
    if labels.dtype.kind not in 'UO' or labels.ndim != 1:
        return labels, tuple(classes)
    names = tuple(classes) or tuple(sorted(set(map(str, labels))))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(str(label), -1) for label in labels]), names


def _encode(item: Any) -> bytes:
    """Returns an item as the bytes of an image file.

    Raises:
      ValueError: It is no image.
    """
    if isinstance(item, Mapping):
        key = next((key for key in ('image', 'img') if key in item), None)
        if key is None:
            raise ValueError(f"an item has the keys {', '.join(item)}; expected 'image' or 'img'")
        item = item[key]
    elif isinstance(item, tuple):
        item = item[0]
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | os.PathLike):
        return read_file(paths.expand(item))
    buffer = io.BytesIO()
    if isinstance(item, Image.Image):
        stored = item if item.mode in _PNG_MODES else item.convert('RGB')
        stored.save(buffer, 'PNG', compress_level=0)
    else:
        if hasattr(item, 'permute'):  # PyTorch has the channels first
            item = item.permute(1, 2, 0) if item.ndim == 3 else item
        np.save(buffer, np.asarray(item), allow_pickle=False)
    return buffer.getvalue()


_PNG_MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I', 'I;16')
