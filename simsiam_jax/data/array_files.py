"""Images in arrays, in .npz files as MedMNIST has them, and in .npy files."""

import hashlib
import io
import re
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors
from simsiam_jax import paths as paths_lib
from simsiam_jax.data import sampler

_SAMPLED = 64  # images whose pixels identify a file


class ArrayFileSource:
    """Images of an array, in host memory or in a memory map.

    Args:
      images: All images, an array [N, H, W, C] of uint8.
      labels: Class of each image; -1 without labels.
      classes: Names of the classes; empty without labels.
      origin: File and array, for messages.
      indices: Positions of the images in `images`; None for all.
    """

    def __init__(
        self,
        images: Any,
        labels: Int[np.ndarray, 'N'],
        classes: tuple[str, ...],
        origin: str,
        indices: Int[np.ndarray, 'n'] | None = None,
    ):
        self._images, self._origin = images, origin
        self._indices = np.arange(len(images)) if indices is None else indices
        self._all_labels, self.labels = labels, labels[self._indices]
        self.classes = classes

    @property
    def identity(self) -> str:
        """Returns a digest of the images' number and shape, and of the pixels of some."""
        digest = hashlib.sha256(str((len(self), *self._images.shape[1:])).encode())
        for i in self._indices[self._sampled()]:
            digest.update(self._images[i].tobytes())
        return digest.hexdigest()

    def _sampled(self) -> Int[np.ndarray, 'n']:
        """Returns evenly spaced positions."""
        return sampler.evenly_spaced(len(self), _SAMPLED)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[bytes, int]:
        buffer = io.BytesIO()
        np.save(buffer, self._images[self._indices[index]])
        return buffer.getvalue(), int(self.labels[index])

    def name(self, index: int) -> str:
        return f'{self._origin}[{self._indices[index]}]'

    def names(self) -> list[str]:
        """Returns the position of each image in the file."""
        return list(map(str, self._indices))

    def take(self, indices: Int[np.ndarray, 'n']) -> 'ArrayFileSource':
        """Returns the images at some indices, with all classes."""
        chosen = self._indices[indices]
        return type(self)(self._images, self._all_labels, self.classes, self._origin, chosen)


def open_npz(spec: str) -> ArrayFileSource:
    """Opens FILE.npz/SPLIT with arrays SPLIT_images and SPLIT_labels, or FILE.npz with images.

    The file may name the classes in an array `classes`. All images are read into memory.

    Args:
      spec: File and split. 'FILE.npz/train[:5000]' has only the first 5,000 images; both ends of
        the range count images as Python does.

    Raises:
      UserError: The file is missing or damaged, or its arrays are no images and labels.
    """
    path, dot, rest = spec.partition('.npz')
    match = re.fullmatch(r'/?([^\[\]]*)(?:\[(-?\d*):(-?\d*)\])?', rest)
    if not match:
        raise errors.UserError(
            f'source is npz:{spec}; expected npz:FILE.npz/SPLIT or npz:FILE.npz/SPLIT[:5000]'
        )
    path, split = paths_lib.expand(path) + dot, match[1]
    prefix = f'{split}_' if split else ''
    try:
        with open(path, 'rb') as opened, np.load(opened, allow_pickle=False) as file:
            names = list(file)
            wanted = {f'{prefix}images', f'{prefix}labels', 'classes'}
            arrays = {name: file[name] for name in wanted.intersection(names)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    if f'{prefix}images' not in arrays:
        splits = [n.removesuffix('_images') for n in names if n.endswith('_images')]
        hint = ' or '.join(f'npz:{path}/{s}' for s in splits)
        raise errors.UserError(
            f'{path} has no array {prefix}images; it has {", ".join(names)}. '
            + (f'Use {hint}' if hint else f'Save the images as {prefix}images')
        )
    classes = tuple(map(str, arrays.get('classes', ())))
    origin = f'{path}[{prefix}images]'
    whole = from_arrays(arrays[f'{prefix}images'], arrays.get(f'{prefix}labels'), classes, origin)
    if not rest.endswith(']'):
        return whole
    start, stop = (int(end) if end else None for end in (match[2], match[3]))
    chosen = np.arange(len(whole))[start:stop]
    if not len(chosen):
        raise errors.UserError(f'npz:{spec} has no images: {origin} has {len(whole)}')
    return whole.take(chosen)


def open_npy(spec: str) -> ArrayFileSource:
    """Opens IMAGES.npy, or IMAGES.npy,LABELS.npy. Images are read when needed.

    Raises:
      UserError: A file is missing or damaged, or it has no images or labels.
    """
    paths = [paths_lib.expand(path) for path in spec.split(',')]
    arrays = []
    for path in paths:
        try:
            arrays.append(np.load(path, mmap_mode='r', allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, error) from error
    if len(arrays) > 2:
        raise errors.UserError(f'source is npy:{spec}; expected npy:IMAGES.npy[,LABELS.npy]')
    return from_arrays(arrays[0], arrays[1] if len(arrays) == 2 else None, (), paths[0])


def _unreadable(path: str, error: Exception) -> errors.UserError:
    if isinstance(error, FileNotFoundError):
        return errors.UserError(f'file of images {path} does not exist')
    reason = errors.reason(error)
    if 'allow_pickle' in reason:
        reason = 'it contains Python objects, which may run code; expected plain arrays'
    return errors.UserError(f'file of images {path} cannot be read: {reason}')


def from_arrays(images: Any, labels: Any, classes: tuple[str, ...], origin: str) -> ArrayFileSource:
    """Returns a source of the images in an array.

    Args:
      images: Array of integers or floats, [N, H, W, C] or [N, H, W].
      labels: See check_labels.
      classes: See check_labels.
      origin: Name of the images in messages.

    Raises:
      UserError: These are no images, or the labels do not fit them.
    """
    shape = images.shape
    if images.dtype.kind not in 'biuf':
        raise errors.UserError(f'{origin} is {images.dtype}; expected integers or floats')
    if images.ndim not in (3, 4) or not images.size:
        raise errors.UserError(f'{origin} has shape {shape}; expected [N, H, W] or [N, H, W, C]')
    if images.ndim == 4 and shape[1] < min(shape[2:]) and shape[2] == shape[3]:
        raise errors.UserError(
            f'{origin} has shape {shape}, which looks like [N, C, H, W]; expected [N, H, W, C]. '
            'Transpose it: images.transpose(0, 2, 3, 1)'
        )
    images = images if images.ndim == 4 else images[..., None]
    labels, classes = check_labels(labels, len(images), classes, origin)
    return ArrayFileSource(images, labels, classes, origin)


def check_labels(
    labels: Any, count: int, classes: tuple[str, ...], origin: str
) -> tuple[Int[np.ndarray, 'N'], tuple[str, ...]]:
    """Returns the class of each image, -1 without labels, and the names of the classes.

    Args:
      labels: Whole numbers, one for each image; None if there are none.
      count: Number of images.
      classes: Names of the classes; () uses the numbers.
      origin: Name of the images in messages.

    Raises:
      UserError: The labels do not fit the images.
    """
    if labels is None:
        return np.full(count, -1), ()
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise errors.UserError(
            f'the labels of {origin} are {labels.dtype} of shape {labels.shape}; expected '
            f'{count} integers, one for each image'
        )
    low, high = int(labels.min()), int(labels.max())
    known = len(classes) or high + 1
    if low < 0 or high >= known:
        raise errors.UserError(
            f'the labels of {origin} are from {low} to {high}; expected 0 to {known - 1}'
        )
    return labels.astype(np.int64), classes or tuple(str(i) for i in range(known))
