"""Measures how long a save delays training, for a ResNet-18 on eight devices; prints seconds.

PYTHONPATH=. python tests/faults/saving.py
"""

import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import tempfile
import time

import jax
import numpy as np

from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.methods import simsiam
from simsiam_jax.models import resnet
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import optim, step

BATCH, SIZE = 64, 32


def main(folder: str, saves: int = 4) -> None:
    mesh = mesh_lib.make_mesh()
    method = simsiam.make(resnet.make('resnet18', stem='cifar', axis_name=mesh_lib.DATA))
    tx, _ = optim.make(batch_size=BATCH, epochs=1, steps_per_epoch=100)
    state = mesh_lib.replicate(step.init_state(method, tx, 0, (SIZE, SIZE, 3)), mesh)
    views = np.random.default_rng(0).standard_normal((2, BATCH, SIZE, SIZE, 3), np.float32)
    batch, train_step = mesh_lib.shard(list(views), mesh), step.make_train_step(method, tx, mesh)
    state = jax.block_until_ready(train_step(state, batch)[0])  # compiled by now
    with checkpoint.open(folder, {}, max_to_keep=2) as checkpoints:
        size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
        print(f'{size:.0f} MiB on each of {mesh.size} devices, batch {BATCH} of {SIZE} pixels')
        for _ in range(saves):
            begin = time.perf_counter()
            state = jax.block_until_ready(train_step(state, batch)[0])
            stepped = time.perf_counter()
            checkpoints.save(state)
            saved = time.perf_counter()
            print(f'step {stepped - begin:.2f} s, delay by a save {saved - stepped:.2f} s')
        begin = time.perf_counter()
        failure = checkpoints.failure(wait=True)
        print(f'last save on disk after another {time.perf_counter() - begin:.2f} s {failure}')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        main(scratch)
