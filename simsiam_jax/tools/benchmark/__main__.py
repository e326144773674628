"""Measures what limits a run.

::

    python -m simsiam_jax.tools.benchmark input --config=configs/imagenet.py

prints, for each value of config.data.on_device, the images per second and per CPU-second that the
input pipeline of this host delivers, and the bytes per image that it sends. It also prints the rate
of decoding alone and of the training step on the devices here.

::

    python -m simsiam_jax.tools.benchmark step --config=... [--batch_sizes=256,512] [--data]

prints the speed of the training step on synthetic images that are on the devices already, and its
share of what the devices can do. --data also measures it with the real input.

::

    python -m simsiam_jax.tools.benchmark aot --target=h100 --config=... [--config.batch_size=1024]

compiles the step for a chip or slice that you need not have (h100:8, v4:2x2x2, v5e:4x4, ...). It
prints memory, kernels, bytes and collectives, the minimum time, and the largest batch per chip.
"""

import functools
import sys
from collections.abc import Callable

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from simsiam_jax import command_line, errors
from simsiam_jax.tools.benchmark import aot, input_speed, speed, workload


def run(arguments: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    data = {'images': given.images, 'image_size': given.image_size}
    try:
        command = arguments.positional[0] if arguments.positional else ''
        commands: dict[str, Callable[[ConfigDict], None]] = {
            'input': functools.partial(
                input_speed.measure_input, count=given.batches, with_step=given.step
            ),
            'step': lambda config: speed.measure(config, _batch_sizes(), given.data, **data),
            'aot': functools.partial(aot.measure, target=given.target, search=given.search, **data),
        }
        errors.check_choice('the command', command, commands)
        if command == 'aot':
            jax.config.update('jax_platforms', 'cpu')  # ahead of time needs no device of the target
        commands[command](arguments.config)
    except errors.UserError as error:
        sys.exit(f'error: {error}')


def _batch_sizes() -> list[int]:
    sizes = flags.FLAGS.batch_sizes
    try:
        return [int(size) for size in sizes]
    except ValueError as error:
        raise errors.UserError(
            f'invalid --batch_sizes: {",".join(sizes)}; expected integers such as 256,512'
        ) from error


def main() -> None:
    flags.DEFINE_integer(
        'batches', 0, 'input: number of batches to measure; 0 measures for about 20 seconds.'
    )
    flags.DEFINE_boolean('step', True, 'input: also measure the training step.')
    flags.DEFINE_list('batch_sizes', [], 'step: global batch sizes; default config.batch_size.')
    flags.DEFINE_boolean('data', False, 'step: also measure with the real input.')
    flags.DEFINE_string('target', 'h100', 'aot: h100, h100:8, v4:2x2x2, v5e:4x4, v5p:2x2x2, ...')
    flags.DEFINE_boolean('search', True, 'aot: search for the largest batch, in many compilations.')
    flags.DEFINE_integer(
        'images', workload.IMAGENET, 'step, aot: number of images in an epoch, for the schedules.'
    )
    flags.DEFINE_integer(
        'image_size', 0, 'step, aot: side of images that stay on the device; 0 uses crops.'
    )
    command_line.start(run, config=True, positional=True)


if __name__ == '__main__':
    main()
