"""Start-up, memory and evaluation with as many images as ImageNet has.

    PYTHONPATH=. python benchmarks/imagenet_scale.py [--count=1281167] [--folder=DIR] [PART ...]

makes a folder of hard links to a few thousand JPEGs in 1,000 classes and TFRecord files of small
records below DIR, runs the parts (folder, tfrecord, bank, rankme; all by default), prints a row for
each figure, and removes the files. Each part runs in a process of its own, which has the peak
resident memory that is printed.
"""

import argparse
import multiprocessing
import os
import pathlib
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from simsiam_jax import config as config_lib
from simsiam_jax.data import sources, tfds_source
from simsiam_jax.tasks import inputs, nearest
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import monitor

CLASSES, LINKED, WIDTH = 1000, 4000, 2048


def timed(what: str, function: Callable[[], object]) -> None:
    start = time.perf_counter()
    function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f'| {what} | {time.perf_counter() - start:,.1f} s | {peak:.2f} GiB |', flush=True)


def make_folder(root: pathlib.Path, count: int) -> None:
    """Makes `count` hard links to LINKED images, in CLASSES folders."""
    rng = np.random.default_rng(0)
    originals = root.with_name('originals')
    originals.mkdir(parents=True)
    for i in range(LINKED):
        picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture.resize((64, 48)).save(originals / f'{i}.jpg')
    for label in range(CLASSES):
        (root / f'n{label:08}').mkdir(parents=True)
    for i in range(count):
        name = root / f'n{i % CLASSES:08}' / f'n{i % CLASSES:08}_{i}.jpg'
        os.link(originals / f'{i % LINKED}.jpg', name)


def folder(root: pathlib.Path, count: int) -> None:
    make_folder(root / 'images', count)
    spec = f'folder:{root}/images'
    timed('folder, listed for the first time', lambda: sources.open_source(spec))
    timed('folder, remembered', lambda: sources.open_source(spec))
    timed('folder, number and digest of its images', lambda: fingerprint(spec))
    config = config_lib.default()
    config.data.update(source=spec, range='dtype')
    config.augment.size = 32
    timed('folder, opened, 100 batches of 128 at 32 pixels', lambda: batches(config))


def fingerprint(spec: str) -> None:
    sources.fingerprint(sources.open_source(spec))


def batches(config: ConfigDict) -> None:
    from simsiam_jax.data.sampler import IndexSampler
    from simsiam_jax.tasks import pretrain_setup

    source = inputs.open_source(config.data.source, config.data)
    recipes, sampler = pretrain_setup.build_recipes(config), IndexSampler(0, len(source), 128)
    make = inputs.device_batches(source, sampler, recipes, config.data, mesh_lib.make_mesh())
    for _ in make(0, 100):
        pass


def tfrecord(root: pathlib.Path, count: int) -> None:
    (root / 'records').mkdir()
    record = struct.pack('<Q4x', 100) + bytes(100 + 4)
    shards = []
    for number in range(1024):
        path, here = root / 'records' / f'{number}.tfrecord', count // 1024
        path.write_bytes(record * here)
        shards.append((str(path), 0, here))

    def index() -> None:
        tfds_source.TfRecordSource(shards, (), 'tfds:x/train')

    timed('TFRecord, indexed for the first time', index)
    timed('TFRecord, remembered', index)


def bank(_: pathlib.Path, count: int) -> None:
    """Searches a bank in float16 for 1,024 queries; a share of it is a device's memory."""
    rng = np.random.default_rng(0)
    part = rng.standard_normal((4096, WIDTH), np.float32).astype(np.float16)
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    share, block = nearest._share(count, nearest._BLOCK)
    made = nearest._empty(share, WIDTH, mesh, block, np.float16)
    features, rows, add = made.features, made.rows, nearest._adder(mesh)
    for start in range(0, count - len(part), len(part)):
        features, rows = add(features, rows, part, start + np.arange(len(part)), start)
    filled = nearest.Bank(features, rows, mesh, block)
    queries = part[:256].astype(np.float32)
    timed(
        f'kNN, 256 queries in {count:,} x {WIDTH} of float16',
        lambda: jax.block_until_ready(filled.nearest(queries, 200)),
    )


def rankme(_: pathlib.Path, __: int) -> None:
    x = np.random.default_rng(0).standard_normal((2 * WIDTH, WIDTH)).astype(np.float32)
    second = x.T @ x / len(x)
    timed(f'RankMe of {WIDTH} channels, in a thread', lambda: monitor.effective_rank(second))


PARTS = {'folder': folder, 'tfrecord': tfrecord, 'bank': bank, 'rankme': rankme}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--count', type=int, default=1_281_167)
    parser.add_argument('--folder')
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'{", ".join(PARTS)}')
    arguments = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder))
    os.environ['XDG_CACHE_HOME'] = str(root / 'cache')
    print('| what | time | peak memory |\n|---|---|---|')
    try:
        for name in arguments.parts or PARTS:
            context = multiprocessing.get_context('spawn')
            process = context.Process(target=PARTS[name], args=(root, arguments.count))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
    finally:
        shutil.rmtree(root)


if __name__ == '__main__':
    main()
