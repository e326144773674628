"""Measures the input pipeline of this host."""

import time
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.data import host
from simsiam_jax.data.reader import Reader
from simsiam_jax.tasks import inputs, pretrain_setup
from simsiam_jax.tools.benchmark import speed, workload


def rates(batches: Iterator[Any], batch_size: int, count: int) -> tuple[float, float, Any]:
    """Returns (images per second, images per CPU-second, a batch), after two batches to warm up."""
    for _ in range(2):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        batch = next(batches)
    images = batch_size * count
    return images / (time.perf_counter() - wall), images / (time.process_time() - cpu), batch


def measure_input(config: ConfigDict, count: int, with_step: bool) -> None:
    """Prints the rates of decoding, of the input for each on_device, and of the step.

    Args:
      config: Configuration of a pre-training.
      count: Number of batches to measure.
      with_step: Measure the training step too.

    Raises:
      UserError: The images stay on the device, so the host has no input to prepare.
    """
    config.data.backend = 'host'
    parts = pretrain_setup.build(config)
    if not isinstance(parts.source, Reader):
        raise errors.UserError(
            f'cannot measure the input of {config.data.source}: its images stay on the device; '
            'expected a source that is read during training'
        )
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    begin, decoded = time.process_time(), min(config.batch_size, 256)
    for index in parts.sampler.indices(0)[:decoded]:
        parts.source.example(int(index))
    rows.append(('decode alone', None, decoded / (time.process_time() - begin), None))
    for on_device in host.ON_DEVICE:
        config.data.on_device = on_device
        batches = inputs.device_batches(
            parts.source, parts.sampler, parts.recipes, config.data, parts.mesh
        )(0, count + 2)
        wall, cpu, batch = rates(batches, config.batch_size, count)
        sent = sum(x.nbytes for x in jax.tree.leaves(batch)) / config.batch_size
        rows.append((on_device, wall, cpu, sent))
    print(f'{"on_device":14}{"images/s":>10}{"per CPU-second":>16}{"bytes/image":>13}')
    for name, *figures in rows:
        print(
            f'{name:14}{_number(figures[0]):>10}{_number(figures[1]):>16}{_number(figures[2]):>13}'
        )
    if with_step:
        work = workload.build(config, parts.mesh, images=len(parts.source))
        rate = speed.measure_step(work, rounds=3).images_per_second
        print(f'the step can consume {rate:,.0f} images/s on {speed.describe_devices()}')


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:,.0f}'
