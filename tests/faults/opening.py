"""Takes the disk away while a source of each kind is opened; prints the outcomes by kind.

PYTHONPATH=.:tests python tests/faults/opening.py 20 [SECONDS]

Each kind of source is opened 20 times, half of them for the first time and half with a remembered
index. The disk fails with errors of the system (away.c, needs gcc) from the start or from a random
moment, for 0.1 to SECONDS (1.5) seconds. Each time the images must be those of an undisturbed
opening. If the disk stays away, opening must raise TemporaryError; if a file is missing, the
one-line error must come at once.
"""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile

import away
import numpy as np
import outages

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.data import listing
from simsiam_jax.tasks import inputs

MISSING = ('files:{}/no.txt', 'npz:{}/no.npz', 'npy:{}/no.npy', 'zip:{}/no.zip', 'folder:{}/no')


def write(disk: pathlib.Path) -> dict[str, str]:
    """Writes the same images in all forms; returns their sources by kind."""
    import pyarrow as pa
    import pyarrow.parquet
    import tensorflow_datasets as tfds

    images = disk / 'images'
    outages.write_images(images)
    paths = sorted(images.rglob('*.png'))
    (disk / 'list.txt').write_text('\n'.join(f'images/{p.relative_to(images)}' for p in paths))
    rows = [f'images/{p.relative_to(images)},{p.parent.name}' for p in paths]
    (disk / 'list.csv').write_text('\n'.join(['path,label', *rows]))
    with zipfile.ZipFile(disk / 'a.zip', 'w') as file:
        for path in paths:
            file.write(path, path.relative_to(images))
    with tarfile.open(disk / 'a.tar', 'w') as file:
        file.add(images, '.')
    pixels = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), np.uint8)
    np.savez(disk / 'a.npz', images=pixels)
    np.save(disk / 'a.npy', pixels)
    table = pa.table({'image': [path.read_bytes() for path in paths]})
    pyarrow.parquet.write_table(table, disk / 'a.parquet', row_group_size=16)
    for name in ('array_record', 'tfrecord'):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=f'digits_{name}',
            version='1.0.0',
            features=tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(8, 8, 1))}),
            split_datasets={'train': [(i, {'image': x}) for i, x in enumerate(pixels[:200])]},
            data_dir=str(disk / 'tfds'),
            file_format=name,
            disable_shuffling=True,
        )
    return {
        'folder': f'folder:{images}',
        'folder, wildcards': f'folder:{disk}/ima*/*',
        'files, text': f'files:{disk}/list.txt',
        'files, table': f'files:{disk}/list.csv',
        'zip': f'zip:{disk}/a.zip',
        'tar': f'tar:{disk}/*.tar',
        'npz': f'npz:{disk}/a.npz',
        'npy': f'npy:{disk}/a.npy',
        'parquet': f'parquet:{disk}/a.parquet',
        'array_record': 'tfds:digits_array_record/train',
        'TFRecord': 'tfds:digits_tfrecord/train',
    }


def opened(spec: str, disk: pathlib.Path, retry_seconds: float = 60.0) -> dict[str, object]:
    data = config_lib.default().data
    data.retry_seconds, data.tfds_data_dir = retry_seconds, str(disk / 'tfds')
    source = inputs.open_images(spec, data)
    return {'count': len(source), 'classes': source.classes, 'name': source.name(len(source) - 1)}


def run(trials: int, longest: float, folder: pathlib.Path) -> None:
    disk, flag, cache = folder / 'disk', folder / 'away', folder / 'cache' / 'simsiam_jax'
    os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
    listing.LARGE = 10  # these sets are remembered, too
    for kind, spec in write(disk).items():
        begin = time.monotonic()
        expected = opened(spec, disk)
        first = time.monotonic() - begin
        for number in range(trials):
            if number % 2:
                shutil.rmtree(cache / 'listings', ignore_errors=True)
            after = random.choice([0.0, random.uniform(0, first)])
            seconds = random.uniform(0.1, longest)
            thread = threading.Thread(target=away.take, args=(flag, after, seconds))
            if not after:
                flag.touch()
            thread.start()
            found = opened(spec, disk)
            thread.join()
            if found != expected:
                raise AssertionError(f'{kind}, after {after} s: {found}, expected {expected}')
        flag.touch()
        check_fails(spec, disk, errors.TemporaryError, 0.5, 5.0)
        flag.unlink()
        print(f'{kind}: {trials} of {trials} opened, gave up in time when away', flush=True)
    for form in MISSING:
        check_fails(form.format(disk), disk, errors.UserError, 60.0, 1.0)
    print(f'{len(MISSING)} missing files: one-line error at once')


def check_fails(spec: str, disk: pathlib.Path, kind: type, retry: float, limit: float) -> None:
    begin = time.monotonic()
    try:
        opened(spec, disk, retry)
    except errors.UserError as error:
        lasted = time.monotonic() - begin
        if type(error) is not kind or lasted > limit or '\n' in str(error):
            raise AssertionError(f'{spec}: after {lasted:.1f} s') from error
    else:
        raise AssertionError(f'{spec} was opened')


if __name__ == '__main__':
    count, longest = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.5
    if 'AWAY_ROOT' in os.environ:
        run(count, longest, pathlib.Path(os.environ['AWAY_ROOT']).parent)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            place = pathlib.Path(scratch)
            variables = away.build(place, place / 'disk', place / 'away')
            command = [sys.executable, __file__, str(count), str(longest)]
            raise SystemExit(subprocess.run(command, env=os.environ | variables).returncode)
