"""Counts what the logs of a run in a bucket send, and checks what arrives; prints the figures.

PYTHONPATH=. python tests/faults/logs.py [POINTS]

fake_gcs.py serves the bucket on this machine; needs openssl. A writer logs POINTS (400) points of
ten metrics, four of them in the time between two uploads, to metrics.jsonl and TensorBoard. It is
opened again at half of the steps, as a run that is resumed.
"""

import os
import pathlib
import sys
import tempfile
import time

import fake_gcs

from simsiam_jax.logs import writers
from simsiam_jax.pages import runs

WORKDIR = f'gs://{fake_gcs.BUCKET}/run'
SECONDS = 0.1  # between two uploads


def run(points: int, bucket: fake_gcs.Bucket) -> None:
    writers.INTERVAL = SECONDS
    half = points // 2
    for start, last in ((0, half + 20), (half, points)):
        with writers.MetricWriter(WORKDIR, tensorboard=True, step=start) as log:
            for step in range(start + 1, last + 1):
                log.scalars(step, {f'train/metric_{i}': step / (i + 1) for i in range(10)})
                time.sleep(SECONDS / 4)
    sent = bucket.counts()
    kept = sum(len(bucket.get(name)[1]) for name in bucket.names('run/'))
    print(f'{points + 20} points, {kept:,} bytes in {bucket.names("run/")}, sent: {sent}')
    curve = runs.read_curves(WORKDIR)['train/metric_0']
    if curve != [(step, step) for step in range(1, points + 1)]:
        raise AssertionError(f'metrics.jsonl has {curve}')


if __name__ == '__main__':
    with (
        tempfile.TemporaryDirectory() as scratch,
        fake_gcs.serve(pathlib.Path(scratch)) as (bucket, variables),
    ):
        os.environ.update(variables)
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 400, bucket)
