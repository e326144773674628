"""Benefit of several steps in one call: the quickstart's step in a scan and alone.

    python benchmarks/steps_per_call.py [--steps 1 4 16] [--rounds 8]

Each variant has its own state and the same batches on the device; variants are interleaved.
"""

import argparse
import functools
import runpy
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simsiam_jax.tools.benchmark import workload
from simsiam_jax.training import mesh as mesh_lib


def scanned(work: workload.Workload, steps: int) -> Callable[[], None]:
    """Returns a function that runs `steps` steps in one call."""
    rng = np.random.default_rng(0)
    one = work.batch(lambda shape: rng.integers(0, 256, shape, np.uint8))
    state = mesh_lib.replicate(work.init(), work.mesh)
    step, batch = work.train_step, mesh_lib.shard(one, work.mesh)
    if steps > 1:
        step = jax.jit(functools.partial(jax.lax.scan, work.train_step), donate_argnums=0)
        batch = jax.tree.map(lambda x: jnp.stack([x] * steps), batch)

    def call() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--steps', type=int, nargs='+', default=[1, 4, 16])
    parser.add_argument('--rounds', type=int, default=8)
    given = parser.parse_args()
    config = runpy.run_path('configs/quickstart.py')['get_config']()
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    work = workload.build(config, mesh, images=1437, image_size=8)
    ways = {steps: scanned(work, steps) for steps in given.steps}
    times: dict[int, list[float]] = {steps: [] for steps in ways}
    together = max(ways)
    for turn in range(given.rounds + 1):  # the first turn compiles
        for steps, call in ways.items():
            begin = time.perf_counter()
            for _ in range(together // steps):
                call()
            if turn:
                times[steps].append((time.perf_counter() - begin) / (together // steps * steps))
    print('| steps per call | ms per step | lowest | highest |\n|---|---|---|---|')
    for steps, taken in times.items():
        figures = (np.median(taken), min(taken), max(taken))
        print(f'| {steps} | ' + ' | '.join(f'{x * 1e3:.1f}' for x in figures) + ' |')


if __name__ == '__main__':
    main()
