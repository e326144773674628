"""Measures the training step on the devices here: rate, share of what they can do, memory."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.tasks import memory, pretrain_setup
from simsiam_jax.tools.benchmark import aot, cost_model, hardware, hlo, workload
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Speed:
    """A measured step.

    Attributes:
      work: What was measured.
      seconds: Seconds per step in each round.
      compiled: Seconds of compiling; less if the program is in the cache.
      memory: Bytes on a device, as the compiler plans them.
      counts: Figures of the compiled program.
    """

    work: workload.Workload
    seconds: list[float]
    compiled: float
    memory: int
    counts: hlo.Counts

    @property
    def images_per_second(self) -> float:
        return self.work.config.batch_size / statistics.median(self.seconds)

    def row(self) -> str:
        """Returns the columns of HEADER; shares are '-' for devices that hardware.py lacks."""
        batch, taken = self.work.config.batch_size, statistics.median(self.seconds)
        analytic = self.work.analytic_kernels('fused')
        flops = sum(kernel.flops for kernel in analytic)
        device = hardware.find(self.work.mesh.devices.flat[0].device_kind)
        shares = ['-'] * 3
        if device:
            shares = [
                f'{flops / device.flops / taken:.1%}',
                f'{cost_model.seconds(analytic, device) / taken:.1%}',
                f'{aot.seconds(self.counts, device) / taken:.1%}',
            ]
        spread = (max(self.seconds) - min(self.seconds)) / taken
        figures = (
            f'{batch}', f'{self.images_per_second:,.0f}', f'{taken * 1e3:.1f}', f'{spread:.0%}',
            f'{flops / taken / 1e12:.3g}', *shares, f'{self.counts.bytes / 1e9:.4g}',
            f'{self.counts.launches}', f'{self.memory / 2**30:.3g}', f'{self.compiled:.1f}',
        )  # fmt: skip
        columns = zip(HEADER, figures, strict=True)
        return ''.join(f'  {text:>{len(name)}}' for name, text in columns)


# ms is the median of the rounds and spread their range relative to it. TFLOP/s and shares are per
# device.
HEADER = (
    '  batch', 'images/s', '      ms', 'spread', 'TFLOP/s', 'of peak', 'of roofline',
    'of its own bytes', ' GB moved', 'kernels', '   GiB', 'compile s',
)  # fmt: skip


def measure(
    config: ConfigDict,
    batch_sizes: Sequence[int],
    with_data: bool,
    *,
    images: int,
    image_size: int,
    rounds: int = 10,
) -> None:
    """Prints a row for each batch size.

    Args:
      config: Configuration of a pre-training.
      batch_sizes: Global batch sizes; () uses the configuration's own.
      with_data: Also measure the real input, at the last batch size: images per second end to end,
        and the share of the time that the step waits for them.
      images: Number of images in an epoch.
      image_size: Side of images that stay on the device; 0 uses crops.
      rounds: Number of rounds for each batch size.
    """
    print(
        f'{config.method.name} on {config.model.name}, {config.model.dtype}, {describe_devices()}'
    )
    print(''.join(f'  {name}' for name in HEADER))
    for batch_size in batch_sizes or [config.batch_size]:
        config.batch_size = batch_size
        with memory.oom_as_user_error(config):
            work = workload.build(
                config, mesh_lib.make_mesh(), images=images, image_size=image_size
            )
            print(measure_step(work, rounds).row(), flush=True)
    if with_data:
        rate, wait = with_input(config, 5 * rounds)
        print(f'with the input of {config.data.source}: {rate:,.0f} images/s, data wait {wait:.0%}')


def measure_step(work: workload.Workload, rounds: int, *, at_least: float = 0.5) -> Speed:
    """Compiles the step and runs it in `rounds` rounds of at least `at_least` seconds."""
    rng = np.random.default_rng(0)
    arrays = work.batch(lambda shape: rng.integers(0, 256, shape, np.uint8))
    batch = mesh_lib.shard_global(jax.tree.map(np.asarray, arrays), work.mesh)
    state = mesh_lib.replicate(work.init(), work.mesh)
    begin = time.perf_counter()
    step = work.train_step.lower(state, batch).compile()  # type: ignore[attr-defined]
    compiled = time.perf_counter() - begin

    def run(steps: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / steps

    run(2)
    steps = max(1, round(at_least / run(1)))
    seconds = [run(steps) for _ in range(rounds)]
    return Speed(work, seconds, compiled, aot.planned_memory(step), hlo.count(step.as_text()))


def with_input(config: ConfigDict, steps: int) -> tuple[float, float]:
    """Measures the run that main starts.

    Returns (images per second, share of the time that the step waits for them).

    Raises:
      UserError: The run has too few steps.
    """
    parts = pretrain_setup.build(config)
    train_step = pretrain_setup.build_step(config, parts)
    warm = 3
    if (last := config.epochs * parts.sampler.steps_per_epoch) <= warm:
        raise errors.UserError(
            f'cannot measure a run of {last} steps; expected more than {warm}. Raise config.epochs'
        )
    steps = min(steps, last - warm)
    state, batches = mesh_lib.replicate(parts.init(), parts.mesh), parts.batches(0, warm + steps)
    for _ in range(warm):
        state, _ = train_step(state, next(batches))
    jax.block_until_ready(state)
    begin, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        waited -= time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter()
        state, _ = train_step(state, batch)
        jax.block_until_ready(state)  # otherwise the wait would include the step
    taken = time.perf_counter() - begin
    return config.batch_size * steps / taken, waited / taken


def describe_devices() -> str:
    """Returns number and kind of the devices here."""
    devices = jax.devices()
    return f'{len(devices)} x {devices[0].device_kind}'
