"""Tables of ROOFLINE.md that need no device: operations, bytes, times, traffic between devices.

    python benchmarks/roofline.py

Times are bounds: each kernel takes as long as its arithmetic or its bytes, and links run at full
speed. A sum over devices also waits for its messages: --gpu_latency seconds for eight GPUs of a
host and --hop_latency for each hop of a TPU's links are assumed, not measured.
"""

import argparse
import functools
import runpy

import jax
import jax.numpy as jnp

from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.benchmark import cost_model, hardware

# Slices and hosts: device, number of devices, and hops to the farthest device and back.
SLICES = (
    ('NVIDIA H100', '8 (one host)', 8, 0),
    ('TPU v4', '2x2x2', 8, 6),
    ('TPU v4', '4x4x4', 64, 12),
    ('TPU v5 lite', '2x4', 8, 8),
    ('TPU v5 lite', '4x8', 32, 20),
    ('TPU v5 lite', '16x16', 256, 32),
    ('TPU v5', '2x2x2', 8, 6),
    ('TPU v5', '4x4x4', 64, 12),
)


Net = tuple[list[cost_model.Layer], int]


@functools.cache
def net(file: str, variant: str = '', size: int = 224) -> Net:
    """Returns (layers of a view, parameters) of a configuration."""
    config = runpy.run_path(f'configs/{file}.py')['get_config'](*filter(None, [variant]))
    method = pretrain_setup.build_method(config)
    variables = jax.eval_shape(method.network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
    return cost_model.layers(method.network, size, config.data.channels), parameters


def step(net: Net, batch: int, way: str = 'fused') -> list[cost_model.KernelCost]:
    """Returns the kernels of a step: two views in bfloat16, and the update."""
    layers, parameters = net
    update = cost_model.KernelCost(0, cost_model.update_bytes(parameters))
    return [*cost_model.kernels(layers, batch, way, 2) * 2, update]


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n')
    for row in (header, ['---'] * len(header), *rows):
        print('| ' + ' | '.join(row) + ' |')


def rates(kernels: list[cost_model.KernelCost], batch: int) -> list[str]:
    return [f'{batch / cost_model.seconds(kernels, d):,.0f}' for d in hardware.DEVICES.values()]


def layers(batch: int = 512) -> None:
    rows = []
    for name, network in (('ImageNet', net('imagenet')), ('CIFAR', net('cifar10', size=32))):
        for fusion in cost_model.FUSION_LEVELS:
            kernels = step(network, batch, fusion)
            flops, moved = (
                sum(getattr(kernel, key) for kernel in kernels[:-1]) / (2 * batch)
                for key in ('flops', 'bytes')
            )
            figures = [f'{flops / 1e9:.2f}', f'{moved / 1e6:.1f}']
            rows.append([name, fusion, *figures, *rates(kernels, batch)])
    header = ['config', 'fusion', 'GFLOP a view', 'MB a view', *hardware.DEVICES]
    table(f'Images per second at batch {batch} (two views each)', header, rows)


def growth() -> None:
    rows = [
        [f'batch {size}', *rates(step(net('imagenet'), size), size)]
        for size in (16, 32, 64, 128, 256, 512, 1024)
    ]
    for pixels in (96, 160, 224, 320, 448):
        kernels = step(net('imagenet', size=pixels), 256)
        rows.append([f'{pixels} pixels, batch 256', *rates(kernels, 256)])
    table('Images per second, fused', ['ImageNet', *hardware.DEVICES], rows)


def exchange(gpu_latency: float, hop_latency: float) -> None:
    network, parameters = net('imagenet')
    norms = cost_model.statistics_bytes(network) * 2
    print(f'\ngradients: {4 * parameters / 2**20:.2f} MiB a step')
    print(f'BN statistics: {sum(norms) / 2**20:.2f} MiB a step in {len(norms)} sums')
    sizes, rows = (8, 16, 32, 64, 128, 256), []
    for kind, name, count, hops in SLICES:
        device = hardware.DEVICES[kind]
        taken = {n: cost_model.seconds(step(net('imagenet'), n), device) for n in sizes}
        gradients, statistics = (
            hardware.all_reduce_seconds(size, count, device.link)
            for size in (4 * parameters, sum(norms))
        )
        waits = len(norms) * (hops * hop_latency if hops else gpu_latency)
        synchronized = statistics + waits
        row = [f'{kind}, {name}']
        row += [f'{seconds * 1e3:.2f}' for seconds in (gradients, statistics, waits)]
        row += [f'{taken[n] * 1e3:.0f}' for n in (32, 128)]
        row += [f'{synchronized / taken[n]:.0%}' for n in (8, 32, 128)]
        rows.append([*row, next((f'{n}' for n in sizes if synchronized < 0.1 * taken[n]), 'none')])
    header = ['devices', 'gradients, ms', 'BN bytes, ms', 'BN waits, ms', 'step at 32 a chip, ms']
    header += ['at 128, ms', 'BN share at 8 a chip', 'at 32', 'at 128', 'BN under 10 % from']
    table('What the chips exchange', header, rows)


def swav(dim: int = 128, prototypes: int = 3000, iterations: int = 3) -> None:
    """Prints the cost of z of the global batch, and of Sinkhorn over it on every chip."""
    rows = []
    for batch in (1024, 4096, 16384):
        gathered, scores = 2 * batch * dim * 4, 2 * batch * prototypes * 4
        for kind, name, count, _ in SLICES:
            device, share = hardware.DEVICES[kind], batch // count
            if not 8 <= share <= 512:
                continue
            seconds = cost_model.seconds(step(net('imagenet', 'swav'), share), device)
            there = hardware.all_reduce_seconds(gathered, count, device.link)
            # Scores are written once, then read and written twice per iteration (rows and columns).
            sinkhorn = (1 + 4 * iterations) * scores / device.bandwidth
            row = [f'{batch}', f'{kind}, {name}', f'{share}', f'{gathered / 2**20:.1f}']
            row += [f'{x * 1e3:.2f}' for x in (there, sinkhorn)]
            rows.append([*row, f'{seconds * 1e3:.0f}', f'{(there + sinkhorn) / seconds:.1%}'])
    header = ['batch', 'devices', 'per chip', 'z, MiB', 'gather, ms', 'Sinkhorn, ms', 'step, ms']
    table("SwAV's gather and Sinkhorn", [*header, 'share'], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description='The tables of ROOFLINE.md.')
    parser.add_argument('--gpu_latency', type=float, default=15e-6)
    parser.add_argument('--hop_latency', type=float, default=1e-6)
    arguments = parser.parse_args()
    layers()
    growth()
    exchange(arguments.gpu_latency, arguments.hop_latency)
    swav()


if __name__ == '__main__':
    main()
