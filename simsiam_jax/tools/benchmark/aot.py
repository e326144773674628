"""Compiles the training step ahead of time for chips that are not here, and reports on it."""

import dataclasses
import importlib.resources
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.tasks import memory
from simsiam_jax.tools.benchmark import cost_model, hardware, hlo, workload
from simsiam_jax.training import mesh as mesh_lib

GIB = 2**30


def topology(target: str) -> list[Any]:
    """Returns the devices of a chip or slice that need not be here.

    Args:
      target: 'h100', 'h100:8' (one host), or a slice of TPUs as Google names it, 'v5e:4x4'.

    Raises:
      UserError: The target does not exist, or its compiler is not installed.
    """
    name, _, shape = target.partition(':')
    try:
        if name == 'h100':
            text = importlib.resources.files(__package__).joinpath('h100.txtpb').read_text()
            return list(
                topologies.get_topology_desc(
                    'h100', 'cuda', target_config=text, topology=f'1x1x{shape or 1}'
                ).devices
            )
        os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # the processes use no chip
        os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
        os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
        os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
        # The two cores of a v4 chip work as one device.
        chip = {'chip_config_name': 'megacore'} if name == 'v4' else {}
        return list(topologies.get_topology_desc(target, 'tpu', **chip).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise errors.UserError(
            f'cannot compile for --target={target}: {" ".join(str(error).split())[:200]}; '
            'expected h100, h100:8, v4:2x2x2, v5e:4x4, v5p:2x2x2 or similar. '
            "Install the compilers: pip install 'simsiam_jax[aot]'"
        ) from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      work: What was compiled.
      memory: Bytes on each device; state, batch and activations.
      counts: Figures of the program; None if the step does not fit and there is no program.
    """

    work: workload.Workload
    memory: int
    counts: hlo.Counts | None


def compile_step(work: workload.Workload) -> Compiled:
    """Compiles a step for the devices of its mesh."""
    try:
        compiled = work.train_step.lower(*work.abstract()).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r'Used ([\d.]+)([KMG]) of', str(error))
        if 'RESOURCE_EXHAUSTED' not in str(error) or not used:
            raise
        memory = round(float(used[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[used[2]])
        return Compiled(work, memory, None)
    return Compiled(work, planned_memory(compiled), hlo.count(compiled.as_text()))


def planned_memory(compiled: Any) -> int:
    """Returns the bytes on each device that a program needs: arguments, results, temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def report(result: Compiled) -> str:
    """Returns the figures, one per line."""
    work, device = result.work, _device(result.work)
    chips, batch = work.mesh.size, work.config.batch_size
    lines = [
        f'{work.config.method.name} on {work.config.model.name}, batch {batch} on {chips} x '
        f'{_kind(work)}: {batch / chips:g} per chip',
        f'memory per chip: {result.memory / GIB:.3g} GiB of {device.memory / GIB:.0f}'
        + (f', of which JAX allocates {device.usable:.0%}' if device.usable < 1 else ''),
    ]
    analytic = {fusion: work.analytic_kernels(fusion) for fusion in cost_model.FUSION_LEVELS}
    flops = sum(kernel.flops for kernel in analytic['fused'])
    lines.append(f'analytic: {flops / 1e12:.3g} TFLOP per chip and step')
    for fusion, kernels in analytic.items():
        lines.append(
            f'  {fusion:9}{sum(k.bytes for k in kernels) / 1e9:8.4g} GB  '
            + _rate(cost_model.seconds(kernels, device), batch)
        )
    for name, sums in work.allreduce_bytes().items():
        lines.append(f'  all-reduce of {name}: {sum(sums) / 2**20:.2f} MiB in {len(sums)}')
    if not (counts := result.counts):
        return '\n'.join([*lines, 'the step does not fit in the memory, so it was not compiled'])
    lines.append(
        f'compiled: {counts.launches} kernels, {counts.bytes / 1e9:.4g} GB, '
        + _rate(seconds(counts, device), batch)
    )
    if cycles := sum(kernel.cycles * kernel.runs for kernel in counts.kernels):
        lines.append(f'  estimate of the compiler: {cycles / 1e6:.4g} million cycles')
    if counts.float32:
        lines.append(f'  largest float32: {_array(counts.float32[0])}')
    for name, arrays in (('scatters', counts.scatters), ('transposes and copies', counts.moves)):
        lines.append(
            f'  {name}: {len(arrays)}' + (f', largest {_array(arrays[0])}' if arrays else '')
        )
    lines.append(f'  donated: {len(counts.donated)} arrays')
    for c in counts.collectives:
        time = hardware.all_reduce_seconds(c.bytes, c.devices, device.link)
        lines.append(
            f'  {c.op} between {c.devices}: {c.count} with {c.bytes / 2**20:.4g} MiB in total'
            f'{f", {c.pairs} asynchronous" if c.pairs else ""}; {time * 1e3:.3g} ms at the '
            'bandwidth of the links'
        )
    return '\n'.join(lines)


def seconds(counts: hlo.Counts, device: hardware.Device) -> float:
    """Returns the minimum time of a program, with each kernel limited by arithmetic or memory."""
    return sum(
        k.runs * max(k.flops / device.flops, k.bytes / device.bandwidth) for k in counts.kernels
    )


def largest_batch(result: Compiled, *, images: int, image_size: int) -> tuple[int, int] | None:
    """Returns the largest batch per chip that fits, in steps of 8, and its memory.

    Compiles every batch that it tries; the first is extrapolated from the given result.

    Args:
      result: The step at another batch size.
      images: Number of images in an epoch.
      image_size: Side of images that stay on the device; 0 uses crops.

    Returns:
      (images per chip, bytes per chip), or None if 8 images do not fit.
    """
    work, device = result.work, _device(result.work)
    unit = 8 * work.config.optim.gradient_accumulation_steps
    state = jax.eval_shape(work.init)
    # The gradients are as large as the parameters.
    fixed = memory.size_of((state, state.params))
    limit, given = device.memory * device.usable, work.config.batch_size // work.mesh.size
    batch = round((limit - fixed) * given / max(result.memory - fixed, 1)) // unit * unit
    while batch >= unit:
        config = work.config.copy_and_resolve_references()
        config.batch_size = batch * work.mesh.size
        images = max(images, config.batch_size)
        trial = workload.build(config, work.mesh, images=images, image_size=image_size)
        compiled = compile_step(trial)
        if compiled.counts and compiled.memory <= limit:
            return batch, compiled.memory
        batch = min(batch - unit, int(batch * limit / compiled.memory) // unit * unit)
    return None


def measure(config: ConfigDict, target: str, *, images: int, image_size: int, search: bool) -> None:
    """Prints the report on the step of a configuration on a target, and the largest batch."""
    chips = topology(target)
    if config.model.kernels == 'auto':  # as a run on the chip resolves it
        config.model.kernels = 'fused' if chips[0].platform in ('cuda', 'gpu') else 'plain'
    mesh = mesh_lib.make_mesh(chips)
    result = compile_step(workload.build(config, mesh, images=images, image_size=image_size))
    print(report(result), flush=True)
    if search:
        best = largest_batch(result, images=images, image_size=image_size)
        print(
            f'largest batch per chip: {best[0]}, {best[1] / GIB:.2f} GiB'
            if best
            else 'no batch fits: 8 images per chip need more memory'
        )


def _rate(seconds: float, batch: int) -> str:
    return f'at least {seconds * 1e3:.4g} ms, at most {batch / seconds:,.0f} images/s'


def _array(array: hlo.Array) -> str:
    return f'{array.type.partition("{")[0]} ({array.op} in {array.name})'


def _kind(work: workload.Workload) -> str:
    return work.mesh.devices.flat[0].device_kind


def _device(work: workload.Workload) -> hardware.Device:
    if device := hardware.find(_kind(work)):
        return device
    raise errors.UserError(
        f'unknown device {_kind(work)}; expected one of {", ".join(hardware.DEVICES)}. '
        'Add it to tools/benchmark/hardware.py'
    )
