"""Opens image sets as a configuration's data section describes them, and loads batches."""

import functools
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.data import device_cache, files, host, sources
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
      data: The data section of the configuration.

    Raises:
      UserError: The set does not exist, data.backend is 'resident' and it cannot be, or the
        processes of the run see different images.
    """
    errors.check_choice('data.backend', data.backend, ('auto', 'resident', 'host'))
    list_folder = functools.partial(_list_folder, retry_seconds=data.retry_seconds)
    source = sources.open_source(spec, data.tfds_data_dir, list_folder)
    if jax.process_count() > 1:
        _check_same_images(spec, source)
    if isinstance(source, sources.ArraySource):
        return source
    reader = Reader(source, data.channels, data.max_bad_fraction, data.retry_seconds)
    if data.backend == 'host':
        return reader
    images = device_cache.load(reader, data.resident_limit)
    if images is None and data.backend == 'resident':
        raise errors.UserError(
            f'data.backend is resident, but the images of {spec} differ in size, are not all '
            f'readable or exceed data.resident_limit = {data.resident_limit} bytes. Use auto'
        )
    return images or reader


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
        raise errors.UserError(
            f'the processes see different images in {spec} ({"; ".join(parts)}). Give all of them '
            'the same images'
        )


def measure_normalization(source: ImageSet, sample: int = 1000) -> dict[str, tuple[float, ...]]:
    """Returns mean and std per channel, of values in [0, 1], from evenly spaced images.

    Args:
      source: Image set.
      sample: Largest number of images to read.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int)
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for index in indices:
        if isinstance(source, sources.ArraySource):
            image = source.images[index]
        else:
            image, _ = source.example(int(index))
        pixels = image.reshape(-1, image.shape[-1]) / 255
        count, total = count + len(pixels), total + pixels.sum(0)
        squares = squares + np.square(pixels).sum(0)
    mean = total / count
    # The floor avoids a division by zero if all images are constant.
    std = np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1 / 255)
    return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}


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
