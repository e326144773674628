"""Splits of TFDS datasets, read by index."""

import concurrent.futures
import contextlib
import difflib
import fcntl
import itertools
import os
import struct
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from simsiam_jax import errors, lazy_tf, paths, patience, terminal
from simsiam_jax.data import listing


class TfdsSource:
    """A split of a TFDS dataset in array_record files, which can be read by index.

    Args:
      records: Serialized records by index.
      classes: Names of the classes; empty without labels.
      name: Name of the split, tfds:NAME/SPLIT.
    """

    def __init__(self, records: Any, classes: tuple[str, ...], name: str):
        self._records, self.classes, self.identity = records, classes, name

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[bytes, int]:
        return _parse(self._records[int(index)], labeled=bool(self.classes))

    def name(self, index: int) -> str:
        return f'{self.identity}[{index}]'


class TfRecordSource:
    """A split in TFRecord files; opening it indexes the offsets of the records.

    Args:
      shards: File, first record and number of records of each file of the split.
      classes: Names of the classes; empty without labels.
      name: Name of the split, tfds:NAME/SPLIT.
    """

    def __init__(self, shards: list[tuple[str, int, int]], classes: tuple[str, ...], name: str):
        self.classes, self.identity = classes, name
        self._files = [file for file, _, _ in shards]
        kept = [
            offsets[skip : skip + take]
            for (_, skip, take), offsets in zip(shards, _index(self._files), strict=True)
        ]
        self._offsets = np.array(list(itertools.chain.from_iterable(kept)), np.int64)
        self._numbers = np.repeat(np.arange(len(kept)), list(map(len, kept)))

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> tuple[bytes, int]:
        with open(self._files[self._numbers[index]], 'rb') as file:
            file.seek(self._offsets[index])
            (length,) = struct.unpack('<Q4x', file.read(12))
            record = file.read(length)
        return _parse(record, labeled=bool(self.classes))

    def name(self, index: int) -> str:
        return f'{self._files[self._numbers[index]]} at byte {self._offsets[index]}'


def _parse(record: bytes, *, labeled: bool) -> tuple[bytes, int]:
    """Returns image and label of a serialized tf.train.Example, in 5 us; TFDS takes 150."""
    feature = lazy_tf.load().train.Example.FromString(record).features.feature
    label = feature['label'].int64_list.value[0] if labeled else -1
    return feature['image'].bytes_list.value[0], label


def _index(files: list[str]) -> list[list[int]]:
    """Returns the offsets of each file's records, remembered until a file changes.

    Raises:
      UserError: A file is missing or truncated.
    """

    def make() -> list[list[int]]:
        # Each record takes one read, which a network answers late: many files at a time.
        with concurrent.futures.ThreadPoolExecutor(32) as threads:
            offsets = threads.map(_offsets, files)
            return list(terminal.progress(offsets, 'indexing', total=len(files), unit=' files'))

    try:
        return listing.remember(files, make, lambda index: sum(map(len, index)))
    except OSError as error:
        raise errors.UserError(
            f'TFRecord file {error.filename} cannot be read: {error.strerror}'
        ) from error


def _offsets(path: str) -> list[int]:
    """Returns the offset of each record: 8 bytes of length, 4 of checksum, data, 4 of checksum."""
    offsets, at = [], 0
    with open(path, 'rb', buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while at < size:
            offsets.append(at)
            header = os.pread(file.fileno(), 8, at)
            if len(header) < 8:
                raise errors.UserError(f'{path} is truncated; prepare the dataset again')
            at += 16 + int.from_bytes(header, 'little')
    if at > size:
        raise errors.UserError(f'{path} is truncated; prepare the dataset again')
    return offsets


def open_split(spec: str, data_dir: str) -> TfdsSource | TfRecordSource:
    """Opens the split 'NAME/SPLIT' in array_record or TFRecord files; prepares missing files.

    Raises:
      UserError: TFDS failed in any way.
      OSError: The disk is away.
    """
    name, _, split = spec.rpartition('/')
    if not name or not split:
        raise errors.UserError(f'source is tfds:{spec}; expected tfds:NAME/SPLIT')
    try:
        return _open(spec, data_dir)
    except errors.UserError as error:
        # TFDS takes files on a disk that is away for missing files.
        if patience.outage(error) or not _has_files(name, data_dir):
            raise
    return _open(spec, data_dir)


def _has_files(name: str, data_dir: str) -> bool:
    """Returns whether a version of the dataset is prepared; raises OSError if the disk is away."""
    import tensorflow_datasets as tfds

    root = paths.expand(data_dir) or tfds.core.constants.DATA_DIR
    folder = os.path.join(root, name.partition(':')[0])
    if '://' in folder:
        return False
    return any(paths.matching(f'{folder}{below}/dataset_info.json') for below in ('', '/*', '/*/*'))


def _open(spec: str, data_dir: str) -> TfdsSource | TfRecordSource:
    """Opens a split, see open_split."""
    name, _, split = spec.rpartition('/')
    lazy_tf.load()
    with _one_line('TFDS cannot be imported'):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader
    builder = _builder(tfds, name, data_dir)
    # The default of ten retries takes over three minutes if there is no network.
    downloader.MAX_RETRIES = 3
    if not _is_prepared(builder):
        with (
            _one_line(f'TFDS could not prepare {name} in {builder.data_dir}'),
            _one_at_a_time(builder),
        ):
            builder.download_and_prepare(
                file_format='array_record',
                # The prepared datasets that TFDS hosts are TFRecord.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    builder = _builder(tfds, name, data_dir)  # another process may have prepared it
    formats = sorted(f.value for f in builder.info.available_file_formats())
    features = dict(builder.info.features.items())
    if not isinstance(features.get('image'), tfds.features.Image):
        raise errors.UserError(
            f'TFDS dataset {name} has no feature image; its features are {", ".join(features)}'
        )
    with _one_line(f'source is tfds:{spec}'):
        if not builder.info.splits[split].num_examples:
            raise ValueError('the split is empty')
        label = features.get('label')
        classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        if 'array_record' in formats:
            data = builder.as_data_source(split, file_format='array_record')
            return TfdsSource(data.data_source, classes, f'tfds:{spec}')
        if 'tfrecord' not in formats:
            raise ValueError(f'{", ".join(formats)} files; expected array_record or tfrecord')
        shards = [
            (s.filename, s.skip, s.examples_in_shard if s.take < 0 else s.take)
            for s in builder.info.splits[split].file_instructions
        ]
        if '://' in shards[0][0]:
            raise ValueError(
                f'{shards[0][0]} is a TFRecord file, which is read by index from disks only; copy '
                'the dataset to a disk, or convert it with tfds convert_format to array_record'
            )
        return TfRecordSource(shards, classes, f'tfds:{spec}')


def is_prepared(spec: str, data_dir: str) -> bool:
    """Returns whether the dataset of 'NAME/SPLIT' is prepared on this machine."""
    lazy_tf.load()
    with _one_line('TFDS cannot be imported'):
        import tensorflow_datasets as tfds
    name = spec.rpartition('/')[0]
    return patience.call(
        lambda: _is_prepared(_builder(tfds, name, data_dir)), f'the folder of TFDS dataset {name}'
    )


def _is_prepared(builder: Any) -> bool:
    """Returns whether the dataset's files exist; raises OSError if the disk is away."""
    folder = os.fspath(builder.data_path)
    if '://' in folder:
        return bool(builder.data_path.exists())
    return bool(paths.mode(folder))


def _builder(tfds: Any, name: str, data_dir: str) -> Any:
    with _one_line(f'TFDS cannot open {name}'):
        try:
            # No file_format here: TFDS would reject data converted to array_record afterwards.
            return tfds.builder(name, data_dir=paths.expand(data_dir) or None)
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(name.partition('/')[0], known, n=1)
            hint = f'did you mean {close[0]}?' if close else 'tfds.list_builders() lists its names'
            raise errors.UserError(f'TFDS knows no dataset {name}; {hint}') from None


@contextlib.contextmanager
def _one_at_a_time(builder: Any) -> Iterator[None]:
    """Makes processes that prepare the same dataset wait for the first: TFDS fails otherwise.

    Does nothing in a bucket, which has no locks.
    """
    folder = os.fspath(builder.data_path)
    if '://' in folder:
        yield
        return
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with open(f'{folder}.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'waiting for another process that prepares {builder.name}', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns any error into a one-line UserError: TFDS and its builders raise many types."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 500) or type(error).__name__
        raise errors.UserError(f'{what}: {reason}') from error
