"""Counts the requests that listing images in a bucket takes, in all processes of two starts.

PYTHONPATH=. python tests/faults/listing.py [IMAGES]

fake_gcs.py serves the bucket on this machine; needs google-cloud-storage and openssl. Two processes
open a folder of IMAGES (100,000) objects in 1,000 folders for training and for evaluation. A second
start must not list the folder again, and all starts together may make 200 requests.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import fake_gcs
import kills

ROOT = pathlib.Path(__file__).parent.parent.parent
PROBE = """
import sys
from simsiam_jax import config
from simsiam_jax.runtime import distributed, launchers
from simsiam_jax.tasks import inputs

process_id, port = map(int, sys.argv[1:])
distributed.start(launchers.ClusterSpec(f'127.0.0.1:{port}', 2, process_id), timeout=60)
with distributed.exit_together():
    data = config.default().data
    for part in ('train', 'test'):
        source = inputs.open_source(f'split:0.2/{part}:folder:gs://bucket/set', data)
        print('opened', len(source), len(source.classes), flush=True)
"""


def start() -> list[str]:
    """Returns what each of two processes prints."""
    port = kills.free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROBE, str(process), str(port)],
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=kills.LIMIT)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise AssertionError(outputs)
    return outputs


def run(images: int, bucket: fake_gcs.Bucket) -> None:
    for i in range(images):
        bucket.put(f'set/{i % 1000:03}/{i}.png', b'')
    bucket.page.write_text('1000')
    for what in ('first start', 'second start'):
        outputs = start()
        sizes = [sum(map(int, re.findall(r'opened (\d+) 1000', text))) for text in outputs]
        counts = bucket.counts()
        if sizes != [images, images] or counts['requests'] >= 200:
            raise AssertionError(f'{counts}: {outputs}')
        print(f'{what}: {images:,} images in two processes, {counts} until now', flush=True)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        with fake_gcs.serve(folder) as (bucket, variables):
            os.environ.update(variables, XDG_CACHE_HOME=str(folder / 'cache'))
            run(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, bucket)
