"""Measures what limits a run.

python -m simsiam_jax.tools.benchmark input --config=configs/imagenet.py [--config.key=value ...]

prints, for each value of config.data.on_device, the images a second that this host makes ready,
in all and a CPU-second, and the bytes it sends an image; beside them the decoding alone and what
the training step takes on the devices here.

python -m simsiam_jax.tools.benchmark step --config=... [--batch_sizes=256,512] [--data]

prints how fast the training step is on the devices here, on synthetic images that lie on them
already, and what share that is of what the devices can do; with --data also with the real input.

python -m simsiam_jax.tools.benchmark aot --target=h100 --config=... [--config.batch_size=1024]

compiles the step for a chip or slice that need not be there (h100:8, v4:2x2x2, v5e:4x4, ...) and
prints its memory, kernels, bytes and collectives, the least time, and the batch a chip that fits.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from simsiam_jax import errors, main
from simsiam_jax.data import host
from simsiam_jax.data.reader import Reader
from simsiam_jax.tasks import inputs, pretrain
from simsiam_jax.tools.benchmark import aot, speed, workload

_BATCHES = flags.DEFINE_integer('batches', 6, 'input: batches to measure, after two to warm up.')
_STEP = flags.DEFINE_boolean('step', True, 'input: measure the training step too.')
_SIZES = flags.DEFINE_list('batch_sizes', [], "step: global; default: the configuration's.")
_DATA = flags.DEFINE_boolean('data', False, 'step: measure it with the real input too.')
_TARGET = flags.DEFINE_string('target', 'h100', 'aot: h100, h100:8, v4:2x2x2, v5e:4x4, v5p:2x2x2.')
_SEARCH = flags.DEFINE_boolean(
    'search', True, 'aot: find the largest batch a chip, compiling more.'
)
_IMAGES = flags.DEFINE_integer(
    'images', workload.IMAGENET, 'step, aot: images of an epoch, which the schedules need.'
)
_IMAGE_SIZE = flags.DEFINE_integer(
    'image_size', 0, 'step, aot: side of the images where they all lie on the devices; 0: crops.'
)


def rates(batches: Iterator[Any], batch_size: int, count: int) -> tuple[float, float, Any]:
    """(images a second, images a CPU-second, a batch); the first two batches do not count."""
    for _ in range(2):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        batch = next(batches)
    images = batch_size * count
    return images / (time.perf_counter() - wall), images / (time.process_time() - cpu), batch


def measure_input(config: ConfigDict, count: int, with_step: bool) -> None:
    """Prints the table.

    Raises:
      UserError: the configuration's source is in memory, so that the host has nothing to do.
    """
    config.data.backend = 'host'
    parts = pretrain.build(config)
    if not isinstance(parts.source, Reader):
        raise errors.UserError(
            f'{config.data.source} is kept whole on the device: there is no host input to measure'
        )
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    begin, decoded = time.process_time(), min(config.batch_size, 256)
    for index in parts.order.indices(0)[:decoded]:
        parts.source.example(int(index))
    rows.append(('decode alone', None, decoded / (time.process_time() - begin), None))
    for on_device in host.ON_DEVICE:
        config.data.on_device = on_device
        batches = inputs.device_batches(
            parts.source, parts.order, parts.recipes, config.data, parts.mesh
        )(0, count + 2)
        wall, cpu, batch = rates(batches, config.batch_size, count)
        sent = sum(x.nbytes for x in jax.tree.leaves(batch)) / config.batch_size
        rows.append((on_device, wall, cpu, sent))
    print(f'{"on_device":14}{"images/s":>10}{"a CPU-second":>14}{"bytes an image":>16}')
    for name, *figures in rows:
        print(
            f'{name:14}{_number(figures[0]):>10}{_number(figures[1]):>14}{_number(figures[2]):>16}'
        )
    if with_step:
        work = workload.build(config, parts.mesh, images=len(parts.source))
        rate = speed.measure_step(work, rounds=3).images_per_second
        print(f'the step takes {rate:,.0f} images/s on {speed.devices_here()}')


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:,.0f}'


def run(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    data = {'images': _IMAGES.value, 'image_size': _IMAGE_SIZE.value}
    commands: dict[str, Callable[[ConfigDict], None]] = {
        'input': functools.partial(measure_input, count=_BATCHES.value, with_step=_STEP.value),
        'step': lambda config: speed.measure(config, _batch_sizes(), _DATA.value, **data),
        'aot': functools.partial(aot.measure, target=_TARGET.value, search=_SEARCH.value, **data),
    }
    try:
        command = argv[1] if len(argv) > 1 else ''
        errors.check_choice('the command', command, commands)
        if command == 'aot':
            jax.config.update('jax_platforms', 'cpu')  # the targets' own need not be there
        commands[command](main.CONFIG.value)
    except errors.UserError as error:
        sys.exit(f'error: {error}')


def _batch_sizes() -> list[int]:
    try:
        return [int(size) for size in _SIZES.value]
    except ValueError as error:
        raise errors.UserError(
            f'--batch_sizes is {",".join(_SIZES.value)}; expected whole numbers, 256,512'
        ) from error


if __name__ == '__main__':
    app.run(run, flags_parser=lambda argv: main.parse(argv, required=['config']))
