"""Finds test images that are training images, too."""

import hashlib
import os
import pathlib
from collections.abc import Sequence

from simsiam_jax.data import subset
from simsiam_jax.data.files import FileSource
from simsiam_jax.data.listed import JoinedSource
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sources import ArraySource, Source

# Above this number of files only paths are compared, since each file costs a request of its disk.
_LIMIT = 200_000


def shared_images(train: ArraySource | Reader, test: ArraySource | Reader) -> list[str]:
    """Returns the names of the test images that are training images, too.

    Images in memory are compared by pixels, files by path and by bytes. Records of TFDS, files in a
    bucket, archives and files of arrays are not compared.
    """
    if isinstance(train, ArraySource) and isinstance(test, ArraySource):
        known = {_digest(image.tobytes()) for image in train.images}
        digests = [_digest(image.tobytes()) for image in test.images]
        return [f'image {i}' for i, digest in enumerate(digests) if digest in known]
    paths, tested = _paths(train), _paths(test)
    shared = _same_paths(paths, tested)
    if len(paths) + len(tested) <= _LIMIT:
        paths, tested = ([p for p in some if os.path.isfile(p)] for some in (paths, tested))
        by_size: dict[int, list[str]] = {}
        for path in paths:
            by_size.setdefault(_size(path), []).append(path)
        candidates = [path for path in tested if path not in shared and _size(path) in by_size]
        others = {other for size in map(_size, candidates) for other in by_size[size]}
        known = {_content(other) for other in others}
        shared |= {path for path in candidates if _content(path) in known}
    return [path for path in tested if path in shared]


def _paths(source: ArraySource | Reader) -> Sequence[str]:
    records = None if isinstance(source, ArraySource) else source.source
    return [path for path in _files(records) if '://' not in path]


def _files(records: Source | None) -> Sequence[str]:
    if isinstance(records, FileSource):
        return records.paths
    if isinstance(records, JoinedSource):
        parts = [_files(part) for part in records.parts]
        return [path for part in parts for path in part] if all(parts) else []
    if isinstance(records, subset.Subset) and (paths := _files(records.source)):
        return [paths[i] for i in records.indices]
    return []


def _same_paths(paths: Sequence[str], tested: Sequence[str]) -> set[str]:
    """Returns the tested paths that are among the others, with links in their folders resolved.

    No file is looked at, because a set may have millions on a slow disk.
    """
    folders = {path.rpartition(os.sep)[0] for some in (paths, tested) for path in some}
    real = {folder: os.path.realpath(folder) for folder in folders}

    def resolved(path: str) -> tuple[str, str]:
        folder, _, name = path.rpartition(os.sep)
        return real[folder], name

    known = set(map(resolved, paths))
    return {path for path in tested if resolved(path) in known}


def _size(path: str) -> int:
    return os.path.getsize(path)


def _content(path: str) -> bytes:
    return _digest(pathlib.Path(path).read_bytes())


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
