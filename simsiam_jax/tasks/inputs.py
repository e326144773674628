"""From a configuration's data section to batches on the devices."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.data import device_cache, host, sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.training import mesh as mesh_lib

ImageSet = sources.ArraySource | Reader


def open_source(spec: str, data: ConfigDict) -> ImageSet:
    """The source: whole in memory, or read as it is used, as `data.backend` says.

    Raises:
      UserError: there is no such source, or 'resident' is asked for and cannot be.
    """
    errors.check_choice('data.backend', data.backend, ('auto', 'resident', 'host'))
    source = sources.open_source(spec, data.tfds_data_dir)
    if isinstance(source, sources.ArraySource):
        return source
    reader = Reader(source, data.channels, data.max_bad_fraction)
    if data.backend == 'host':
        return reader
    images = device_cache.load(reader, data.resident_limit)
    if images is None and data.backend == 'resident':
        raise errors.UserError(
            f'data.backend is resident, but the images of {spec} differ in size, cannot all be '
            f'read or take more than data.resident_limit = {data.resident_limit} bytes; use auto'
        )
    return images or reader


def measure_normalization(source: ImageSet, sample: int = 1000) -> dict[str, tuple[float, ...]]:
    """mean and std by channel of values in [0, 1], over images spread evenly over the source."""
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
    # Constant images have no scale of their own.
    std = np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1 / 255)
    return {'mean': tuple(mean.round(4).tolist()), 'std': tuple(std.round(4).tolist())}


def device_batches(
    source: ImageSet,
    sampler: IndexSampler,
    recipes: tuple[Recipe, ...],
    data: ConfigDict,
    mesh: Mesh,
) -> Callable[[int, int], Iterator[Any]]:
    """(start, stop) -> the batches of these steps, on their way to the devices; for host.to_views.

    `data` is the section of the configuration.
    """
    errors.check_choice('data.on_device', data.on_device, host.ON_DEVICE)
    local = mesh_lib.process_slice(sampler.batch_size)
    if isinstance(source, sources.ArraySource):
        device_cache.check_images(source, data.channels)
        images, labels = mesh_lib.replicate((source.images, source.labels), mesh)
        with_images = device_cache.gatherer(images, labels, NamedSharding(mesh, P(mesh_lib.DATA)))

        def from_device(start: int, stop: int) -> Iterator[Any]:
            batches = device_cache.train_batches(
                sampler, recipes, start=start, stop=stop, local=local
            )
            return map(with_images, mesh_lib.prefetch(batches, mesh))

        return from_device

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
