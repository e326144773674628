"""Counts the requests and bytes between a run and its bucket; prints a row for each purpose.

PYTHONPATH=. python tests/faults/traffic.py

fake_gcs.py serves the bucket on this machine; needs google-cloud-storage and openssl. The state is
that of a ResNet-18 with heads, the images are small. benchmarks/ROOFLINE.md uses the figures.
"""

import os
import pathlib
import tempfile

import fake_gcs
import jax
import numpy as np

from simsiam_jax.checkpoints import checkpoint, checkpoint_reader
from simsiam_jax.data import files
from simsiam_jax.methods import simsiam
from simsiam_jax.models import resnet
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import optim, step

WORKDIR = f'gs://{fake_gcs.BUCKET}/run'
IMAGES = 50


def run(bucket: fake_gcs.Bucket) -> None:
    before = {'requests': 0, 'bytes': 0}

    def row(what: str) -> None:
        counts = bucket.counts()
        requests, sent = (counts[key] - before[key] for key in ('requests', 'bytes'))
        before.update(counts)
        print(f'| {what} | {requests:,} requests | {sent / 2**20:,.1f} MiB sent |', flush=True)

    for i in range(IMAGES):
        bucket.put(f'set/{i}.jpg', os.urandom(100_000))
    paths = [f'gs://{fake_gcs.BUCKET}/set/{i}.jpg' for i in range(IMAGES)]
    for path in paths:
        files.read_file(path)
    row(f'{IMAGES} images of 100 kB read')
    method = simsiam.make(resnet.make('resnet18', axis_name=mesh_lib.DATA))
    tx, _ = optim.make(batch_size=8, epochs=1, steps_per_epoch=100)
    mesh = mesh_lib.make_mesh()
    state = mesh_lib.replicate(step.init_state(method, tx, 0, (64, 64, 3)), mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
    print(f'a state of {size:.0f} MiB in {len(jax.tree.leaves(state))} arrays')
    with checkpoint.open(WORKDIR, {}, max_to_keep=2) as checkpoints:
        row('workdir opened')
        for number in range(1, 4):
            checkpoints.save(state.replace(step=np.int32(number)))
            if failure := checkpoints.failure(wait=True):
                raise AssertionError(failure)
            row(f'save {number}')
    row('workdir closed')
    checkpoint_reader.load(WORKDIR, 'state')
    row('state restored')


if __name__ == '__main__':
    with (
        tempfile.TemporaryDirectory() as scratch,
        fake_gcs.serve(pathlib.Path(scratch)) as (bucket, variables),
    ):
        os.environ.update(variables)
        bucket.page.write_text('1000')
        run(bucket)
