"""Measures the input pipeline of this host."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.data import host
from simsiam_jax.data.reader import Reader
from simsiam_jax.tasks import inputs, pretrain_setup
from simsiam_jax.tools.benchmark import speed, workload

_SECONDS = 20.0  # of a steady measurement
_BUFFERED = 4  # batches that wait in the buffers of the host and the devices


def rates(
    load: Callable[[int], Iterator[Any]], batch_size: int, count: int = 0
) -> tuple[float, float, Any]:
    """Returns images per second, images per CPU-second, and a batch.

    Buffered batches come at once, so the first and the last of a stream are not measured.

    Args:
      load: Number -> stream of this number of batches.
      batch_size: Images per batch.
      count: Number of batches to measure; 0 measures for about 20 seconds.
    """
    if not count:
        rate, _, _ = rates(load, batch_size, 2 * _BUFFERED)
        count = max(2 * _BUFFERED, round(_SECONDS * rate / batch_size))
    batches = load(count + 2 * _BUFFERED)
    for _ in range(_BUFFERED):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        batch = next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for _ in batches:  # otherwise its threads would share the cores with what comes next
        pass
    return batch_size * count / wall, batch_size * count / cpu, batch


def measure_input(config: ConfigDict, count: int, with_step: bool) -> None:
    """Prints the rates of decoding, of the input for each on_device, of the step, and advice.

    Args:
      config: Configuration of a pre-training.
      count: Number of batches to measure; 0 measures for about 20 seconds.
      with_step: Measure the training step too.

    Raises:
      UserError: The images stay on the device, so the host has no input to prepare.
    """
    given, config.data.backend = config.data.on_device, 'host'
    parts = pretrain_setup.build(config)
    if not isinstance(parts.source, Reader):
        raise errors.UserError(
            f'cannot measure the input of {config.data.source}: its images stay on the device; '
            'expected a source that is read during training'
        )
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    delivered: dict[str, float] = {}
    begin, decoded = time.process_time(), min(config.batch_size, 256)
    for index in parts.sampler.indices(0)[:decoded]:
        parts.source.example(int(index))
    rows.append(('decode alone', None, decoded / (time.process_time() - begin), None))
    for on_device in host.ON_DEVICE:
        config.data.on_device = on_device
        batches = inputs.device_batches(
            parts.source, parts.sampler, parts.recipes, config.data, parts.mesh
        )
        wall, cpu, batch = rates(functools.partial(batches, 0), config.batch_size, count)
        sent = sum(x.nbytes for x in jax.tree.leaves(batch)) / config.batch_size
        rows.append((on_device, wall, cpu, sent))
        delivered[on_device] = wall
    print(f'{"on_device":14}{"images/s":>10}{"per CPU-second":>16}{"bytes/image":>13}')
    for name, *figures in rows:
        print(
            f'{name:14}{_number(figures[0]):>10}{_number(figures[1]):>16}{_number(figures[2]):>13}'
        )
    config.data.on_device = given
    if with_step:
        work = workload.build(config, parts.mesh, images=len(parts.source))
        rate = speed.measure_step(work, rounds=3).images_per_second
        print(f'the step can consume {rate:,.0f} images/s on {speed.describe_devices()}')
        print(advice(delivered, rate, accelerator=jax.default_backend() != 'cpu'))


def advice(delivered: Mapping[str, float], consumed: float, *, accelerator: bool) -> str:
    """Returns which value of data.on_device suits, and why.

    Args:
      delivered: Value -> images per second of the input, from least to most work for the device.
      consumed: Images per second of the training step.
      accelerator: Whether the device is more than a CPU, so that work on it relieves the host.
    """
    if not accelerator:
        return (
            'data.on_device=none suits: without an accelerator, step and input share the cores, '
            'whichever does the work'
        )
    enough = [name for name, rate in delivered.items() if rate > 1.1 * consumed]
    if enough:
        return (
            f'data.on_device={enough[0]} suits: its input is faster than the step and leaves the '
            'device the least work'
        )
    best = max(delivered, key=lambda name: delivered[name])
    return (
        f'data.on_device={best} suits best, and the training waits for input: '
        f'{delivered[best]:,.0f} of {consumed:,.0f} images/s. Store smaller images, or use a host '
        'with more cores'
    )


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:,.0f}'
