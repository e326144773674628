"""Start-up, memory and evaluation with as many images as ImageNet has.

    PYTHONPATH=. python benchmarks/imagenet_scale.py [--count=1281167] [--folder=DIR] [PART ...]

makes a folder of hard links to a few thousand JPEGs in 1,000 classes and TFRecord files of small
records below DIR, datasets of TFDS among them, runs the parts (PARTS; all by default), prints a row
for each figure, and removes the files. Each part runs in a process of its own, which has the peak
resident memory that is printed.
"""

import argparse
import functools
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
from simsiam_jax import lazy_tf
from simsiam_jax.data import sources, subset, tfds_source
from simsiam_jax.tasks import inputs, nearest
from simsiam_jax.training import logistic, monitor
from simsiam_jax.training import mesh as mesh_lib

CLASSES, LINKED, FILES, WIDTH = 1000, 4000, 1024, 2048


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


def prepared(root: pathlib.Path, count: int, file_format: str) -> str:
    """Writes a TFDS dataset of 1,024 files, hard links to a few; returns the name of its split."""
    tf = lazy_tf.load()
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    name, here = file_format.replace('_', ''), max(count // FILES, 1)
    folder = root / 'tfds' / name / '1.0.0'
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=CLASSES),
        }
    )
    rng, originals = np.random.default_rng(0), root / name
    originals.mkdir()
    for number in range(4):
        path = str(originals / str(number))
        if file_format == 'array_record':
            writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
        else:
            writer = tf.io.TFRecordWriter(path)
        for i in range(here):
            pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
            image = np.asarray(Image.fromarray(pixels).resize((64, 48)))
            example = features.encode_example({'image': image, 'label': i % CLASSES})
            writer.write(features.serialize_example(example))
        writer.close()
    for number in range(FILES):
        target = folder / f'{name}-train.{file_format}-{number:05}-of-{FILES:05}'
        os.link(originals / str(number % 4), target)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split='train', filetype_suffix=file_format
    )
    info = tfds.core.SplitInfo(
        name='train', shard_lengths=[here] * FILES, num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], check_data=False
    )
    return f'tfds:{name}/train'


def tfds_dataset(root: pathlib.Path, count: int, file_format: str) -> None:
    config = config_lib.default()
    config.data.update(source=prepared(root, count, file_format), range='dtype')
    config.data.tfds_data_dir, config.augment.size = str(root / 'tfds'), 32
    config.data.backend = 'host'
    open_it = functools.partial(inputs.open_source, config.data.source, config.data)
    timed(f'TFDS, {file_format}, opened for the first time', open_it)
    timed(f'TFDS, {file_format}, opened again', open_it)
    timed(f'TFDS, {file_format}, labels of all images', lambda: subset.labels(open_it()))
    timed(f'TFDS, {file_format}, 100 batches of 128 at 32 pixels', lambda: batches(config))


def array_record(root: pathlib.Path, count: int) -> None:
    tfds_dataset(root, count, 'array_record')


def tfds_tfrecord(root: pathlib.Path, count: int) -> None:
    tfds_dataset(root, count, 'tfrecord')


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


def regression(_: pathlib.Path, count: int) -> None:
    """Fits a logistic regression to a twelfth of the features, for 100 classes."""
    count, classes = count // 12, 100
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((count, WIDTH), np.float32), np.arange(count) % classes
    x += rng.standard_normal((classes, WIDTH), np.float32)[labels] / 8
    fit = logistic.path(x, labels, np.ones(count, bool), [1.0], classes=classes)
    timed(
        f'logistic regression, {count:,} x {WIDTH}, {classes} classes',
        lambda: jax.block_until_ready(next(fit)),
    )


def rankme(_: pathlib.Path, __: int) -> None:
    x = np.random.default_rng(0).standard_normal((2 * WIDTH, WIDTH)).astype(np.float32)
    second = x.T @ x / len(x)
    timed(f'RankMe of {WIDTH} channels, in a thread', lambda: monitor.effective_rank(second))


PARTS = {
    'folder': folder,
    'tfrecord': tfrecord,
    'array_record': array_record,
    'tfds_tfrecord': tfds_tfrecord,
    'bank': bank,
    'regression': regression,
    'rankme': rankme,
}


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
