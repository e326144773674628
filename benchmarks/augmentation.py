"""Cost of augmentation on the device, and training on a resident dataset of CIFAR's size.

    python benchmarks/augmentation.py [--smoke] [--json FILE]

Measures the same step on normalized views, on uint8 crops (data.on_device=color), on whole images
(all) and on images gathered from a resident dataset. Pixels are random, which costs the same as
photographs. Variants are interleaved, with batches already on the device. Then trains CIFAR's
ResNet-18 on 50,000 images of 32 pixels for an epoch, with parameters drawn on the host, and does
the same with a step that only makes the views: if even that does not wait, no network will.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from simsiam_jax.data import device_cache, host
from simsiam_jax.data.recipe import Recipe, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.logs import progress
from simsiam_jax.methods import simsiam
from simsiam_jax.models import resnet
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import optim, step

MESH = mesh_lib.make_mesh(jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Setting:
    network: str
    stages: tuple[int, ...]
    size: int
    batch: int
    canvas: int
    images: int


SETTINGS = {
    'imagenet': Setting('resnet50', (3, 4, 6, 3), 224, 256, 512, 2048),
    'cifar': Setting('resnet18', (2, 2, 2, 2), 32, 512, 32, 50_000),
}
SMOKE = {
    'imagenet': Setting('resnet18', (1, 1), 24, 8, 32, 32),
    'cifar': Setting('resnet18', (1, 1), 16, 16, 16, 512),
}


def make_step(setting: Setting) -> tuple[Any, Any]:
    """Returns (step, state)."""
    backbone = resnet.make(
        setting.network,
        stages=setting.stages,
        stem='imagenet' if setting.size > 64 else 'cifar',
        dtype='bfloat16',
        axis_name=mesh_lib.DATA,
    )
    method = simsiam.make(backbone)
    tx, _ = optim.make(batch_size=setting.batch, epochs=100, steps_per_epoch=1000)
    shape = (setting.size, setting.size, 3)
    state = mesh_lib.replicate(step.init_state(method, tx, 0, shape), MESH)
    to_views = functools.partial(host.to_views, recipes=recipes(setting))
    return step.make_train_step(method, tx, MESH, to_views), state


def recipes(setting: Setting) -> tuple[Recipe, ...]:
    blur = 0.5 if setting.size > 64 else 0.0  # as configs/cifar10.py
    return (Recipe(size=setting.size, blur=blur),) * 2


def gatherer(setting: Setting) -> Callable[[Any, np.ndarray], Any]:
    """Returns a resident dataset of random pixels: data.device_cache.gatherer."""
    side = setting.canvas
    pixels = np.random.default_rng(0).integers(0, 256, (setting.images, side, side, 3), np.uint8)
    images, labels = mesh_lib.replicate((pixels, np.zeros(setting.images, np.int64)), MESH)
    return device_cache.gatherer(images, labels, NamedSharding(MESH, P(mesh_lib.DATA)))


def variants(setting: Setting) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """Returns (name, function that prepares a batch for the step, batch) of each variant."""
    rng = np.random.default_rng(0)
    order = IndexSampler(0, setting.images, setting.batch)
    index, views = sample_batch_params(order, recipes(setting), 0, slice(0, setting.batch))

    def pixels(size: int) -> np.ndarray:
        return rng.integers(0, 256, (setting.batch, size, size, 3), np.uint8)

    crops = [pixels(setting.size) for _ in range(2)]
    yield 'none', dict, {'crops': [c.astype(np.float32) / 255 for c in crops]}
    yield 'color', dict, {'crops': crops, 'views': views}
    sizes = np.full((setting.batch, 2), setting.canvas, np.float32)
    yield 'all', dict, {'image': pixels(setting.canvas), 'size': sizes, 'views': views}
    select = gatherer(setting)

    def resident(batch: Any) -> Any:
        return select(jax.tree.map(lambda x: x[None], batch), np.asarray(0, np.int32))

    yield 'resident', resident, {'index': index, 'views': views}


def augmentation(setting: Setting, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Returns milliseconds per step of each variant: medians of interleaved rounds."""
    runs = {
        name: [ready, mesh_lib.shard(batch, MESH), *make_step(setting)]
        for name, ready, batch in variants(setting)
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first turn compiles
        for name, (ready, batch, train_step, state) in runs.items():
            begin = time.perf_counter()
            for _ in range(steps):
                state, metrics = train_step(state, ready(batch))
            float(metrics['loss'])
            runs[name][3] = state
            if turn:
                times[name].append((time.perf_counter() - begin) / steps)
    base = np.median(times['none'])
    return [
        {
            'name': name,
            'milliseconds': float(np.median(values)) * 1e3,
            'share': float(np.median(values) / base - 1),
        }
        for name, values in times.items()
    ]


def resident_epoch(setting: Setting, *, network: bool) -> dict[str, Any]:
    """Returns images/s of training on a resident dataset, and the share of waiting for the host.

    Args:
      setting: The data and the network.
      network: Train; False only makes the views.
    """
    order = IndexSampler(0, setting.images, setting.batch)
    select = gatherer(setting)
    if network:
        train_step, state = make_step(setting)
    else:
        to_views = functools.partial(host.to_views, recipes=recipes(setting))
        train_step = jax.jit(
            lambda state, batch: (state, {'loss': sum(map(jnp.sum, to_views(batch)))})
        )
        state = 0

    def train(start: int, stop: int) -> progress.Throughput:
        nonlocal state
        throughput = progress.Throughput(start, stop, setting.batch)
        throughput.start(start)
        batches = device_cache.train_batches(
            order,
            recipes(setting),
            start=start,
            stop=stop,
            local=slice(0, setting.batch),
            send=lambda block: mesh_lib.shard(block, MESH, P(None, mesh_lib.DATA)),
            select=select,
        )
        for batch in throughput.timed(batches):
            state, metrics = train_step(state, batch)
        float(metrics['loss'])
        return throughput

    steps = order.steps_per_epoch * (1 if network else 8)  # many blocks of parameters
    train(0, steps)  # compiles
    rate, wait = train(steps, 2 * steps).lap(2 * steps)
    return {'images_per_second': rate, 'data_wait': wait}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', type=pathlib.Path, help='file of the results')
    parser.add_argument('--smoke', action='store_true', help='tiny networks')
    arguments = parser.parse_args()
    settings = SMOKE if arguments.smoke else SETTINGS
    rounds, steps = (1, 1) if arguments.smoke else (5, 10)
    results: dict[str, Any] = {}
    print(f'{MESH.devices.flat[0].device_kind}\n')
    print('| step | augmentation | ms | of the step |\n|---|---|---|---|')
    for name, setting in settings.items():
        results[name] = augmentation(setting, rounds, steps)
        for row in results[name]:
            print(f'| {name} | {row["name"]} | {row["milliseconds"]:.2f} | {row["share"]:+.1%} |')
    setting = settings['cifar']
    print(f'\nresident, {setting.images:,} images of {setting.size} pixels:')
    for name, network in (('training', True), ('views alone', False)):
        results[f'resident, {name}'] = epoch = resident_epoch(setting, network=network)
        print(
            f'{name}: {epoch["images_per_second"]:,.0f} images/s, '
            f'waits for the host {epoch["data_wait"]:.1%} of the time'
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
