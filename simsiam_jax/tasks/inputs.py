"""Opens image sets as a configuration's data section describes them, and loads batches."""

import functools
import hashlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors, paths, patience
from simsiam_jax.data import device_cache, files, host, sample_statistics, sources, value_range
from simsiam_jax.data.decode import Decoding
from simsiam_jax.data.listed import Listed
from simsiam_jax.data.patterns import Patterns
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.runtime import distributed
from simsiam_jax.training import mesh as mesh_lib

ImageSet = sources.ArraySource | Reader


def resolve(config: ConfigDict, source: str) -> None:
    """Replaces config.eval.split by parts of a set, and an eval.resize of None by its value.

    Args:
      config: Configuration of any task, changed in place. A part of config.data.source is held out
        of pre-training, too.
      source: Images of pre-training, which are split if config.eval.train is not set.

    Raises:
      UserError: config.eval.test is set, too.
    """
    if config.eval.resize is None:
        config.eval.resize = config_lib.resize_of(config.augment.size)
    share, whole = config.eval.split, config.eval.train or source
    if not share or whole.startswith('split:'):
        return
    if config.eval.test:
        raise errors.UserError(
            f'config.eval.split={share} holds out test images, but config.eval.test is '
            f'{config.eval.test!r}. Set one of the two'
        )
    for part in ('train', 'test'):
        config.eval[part] = f'split:{share}/{part}:{whole}'
    if config.data.get('source') == whole:
        config.data.source = config.eval.train


def open_source(spec: str, data: ConfigDict) -> ImageSet:
    """Returns an image set, either whole in memory or read on demand, by data.backend.

    Args:
      spec: Name of the set, as config.data.source.
      data: The data section of the configuration. If its range is auto, it is measured and set.

    Raises:
      UserError: The set does not exist, data.backend is 'resident' and it cannot be, or the
        processes of the run see different images.
    """
    errors.check_choice('data.backend', data.backend, ('auto', 'resident', 'host'))
    source = open_images(spec, data)
    if jax.process_count() > 1:
        _check_same_images(spec, source)
    if isinstance(source, sources.ArraySource):
        return source
    reader = Reader(
        source, data.channels, data.max_bad_fraction, data.retry_seconds, decoding(data)
    )
    if data.range == 'auto':
        data.range = distributed.from_process_0(
            lambda: str(sample_statistics.measure_range(reader))
        )
        reader.decoding = decoding(data)
    if data.backend == 'host':
        return reader
    images = device_cache.load(reader, data.resident_limit)
    if images is None and data.backend == 'resident':
        raise errors.UserError(
            f'data.backend is resident, but the images of {spec} differ in size, are not all '
            f'readable or exceed data.resident_limit = {data.resident_limit} bytes. Use auto'
        )
    return images or reader


def measure_normalization(source: ImageSet) -> dict[str, tuple[float, ...]]:
    """Returns augment.mean and augment.std as process 0 measures them."""
    measured = distributed.from_process_0(lambda: sample_statistics.measure_normalization(source))
    return {key: tuple(values) for key, values in measured.items()}


def decoding(data: ConfigDict) -> Decoding:
    """Returns how a data section decodes images; a `range` of auto counts as dtype.

    Raises:
      UserError: The range or the background is impossible.
    """
    background = tuple(data.background)
    if len(background) not in {0, 1, data.channels} or not all(0 <= x <= 255 for x in background):
        raise errors.UserError(
            f'config.data.background is {background}; expected values from 0 to 255: one, or '
            f'{data.channels}, or () to ignore transparency'
        )
    text = 'dtype' if data.range == 'auto' else data.range
    return Decoding(value_range.parse(text, data.channels), data.orientation, background)


def open_images(spec: str, data: ConfigDict) -> sources.Source | sources.ArraySource:
    """Returns the source with the files that data.include and data.exclude leave.

    Waits up to data.retry_seconds for storage that is away.

    Args:
      spec: Name of the set, as config.data.source.
      data: The data section of the configuration.

    Raises:
      UserError: The set does not exist, or no file is left.
      TemporaryError: The storage has failed for longer than data.retry_seconds.
    """
    patterns = Patterns(data.include, data.exclude)
    list_folder = functools.partial(_list_folder, retry_seconds=data.retry_seconds)
    return patience.call(
        lambda: sources.open_source(spec, data.tfds_data_dir, patterns, list_folder),
        f'the images {spec}',
        lambda error: patience.outage(error) is not None,
        seconds=data.retry_seconds,
    )


def _list_folder(root: str, retry_seconds: int | float) -> list[str]:
    """Returns the images below a folder or URL; process 0 lists a URL for all processes."""
    if '://' not in root:
        return files.list_folder(root, retry_seconds)
    return distributed.from_process_0(lambda: files.list_folder(root, retry_seconds))


def _check_same_images(spec: str, source: sources.Identified) -> None:
    """Raises UserError, in all processes, if they would draw different batches from the source."""
    own = sources.fingerprint(source) | {'host': socket.gethostname()}
    seen: dict[tuple[int, str], list[str]] = {}
    for process, found in enumerate(distributed.gather(own)):
        place = f'process {process} on {found["host"]}'
        seen.setdefault((found['count'], found['digest']), []).append(place)
    if len(seen) > 1:
        counts = {count for count, _ in seen}
        what = '' if len(counts) > 1 else ' of other names'
        parts = [f'{", ".join(places)}: {count}{what}' for (count, _), places in seen.items()]
        example = ''
        if isinstance(source, Listed):
            example = _first_difference(source.names(), max(counts))
        raise errors.UserError(
            f'the processes see different images in {spec} ({"; ".join(parts)}){example}. Give all '
            'of them the same images'
        )


def _first_difference(names: list[str], longest: int) -> str:
    """Returns text about the first name that differs between processes; '' if none does.

    Args:
      names: Names of this process.
      longest: Number of names of the process that has most.
    """
    start, stop = 0, longest
    while stop - start > 1:
        step = -(-(stop - start) // 64)
        starts = range(start, stop, step)
        parts = ('\0'.join(names[i : min(i + step, stop)]) for i in starts)
        encoded = (part.encode('utf-8', 'surrogateescape') for part in parts)
        rows = distributed.gather([hashlib.sha256(part).hexdigest() for part in encoded])
        differing = [i for i, *found in zip(starts, *rows, strict=True) if len(set(found)) > 1]
        if not differing:
            return ''
        start, stop = differing[0], min(differing[0] + step, stop)
    own = paths.printable(names[start]) if start < len(names) else 'none'
    seen: dict[str, int] = {}
    for process, name in enumerate(distributed.gather(own)):
        seen.setdefault(name, process)
    examples = [f'{name} in process {process}' for name, process in seen.items()]
    return f'; first difference: {", ".join(examples[:3])}' if len(examples) > 1 else ''


def device_batches(
    source: ImageSet,
    sampler: IndexSampler,
    recipes: tuple[Recipe, ...],
    data: ConfigDict,
    mesh: Mesh,
) -> Callable[[int, int], Iterator[Any]]:
    """Returns a function (start, stop) -> prefetched device batches of these steps.

    Args:
      source: Image set.
      sampler: Order of the images.
      recipes: Augmentation of each view, completed by host.to_views.
      data: The data section of the configuration.
      mesh: Devices that share each batch.

    Raises:
      UserError: data.on_device is unknown, or the images do not have data.channels.
    """
    errors.check_choice('data.on_device', data.on_device, host.ON_DEVICE)
    local = mesh_lib.process_slice(sampler.batch_size)
    if isinstance(source, sources.ArraySource):
        device_cache.check_images(source, data.channels)
        images, labels = mesh_lib.replicate((source.images, source.labels), mesh)
        select = device_cache.gatherer(images, labels, NamedSharding(mesh, P(mesh_lib.DATA)))

        return lambda start, stop: device_cache.train_batches(
            sampler,
            recipes,
            start=start,
            stop=stop,
            local=local,
            send=lambda block: mesh_lib.shard(block, mesh, P(None, mesh_lib.DATA)),
            select=select,
        )

    def from_host(start: int, stop: int) -> Iterator[Any]:
        batches = host.train_batches(
            source,
            sampler,
            recipes,
            on_device=data.on_device,
            canvas=data.canvas,
            start=start,
            stop=stop,
            local=local,
        )
        return mesh_lib.prefetch(batches, mesh)

    return from_host
