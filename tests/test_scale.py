"""Tests of start-up and memory with many images: data/*.py and benchmarks/imagenet_scale.py."""

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from simsiam_jax import lazy_tf

ROOT = pathlib.Path(__file__).parent.parent
COUNT, CLASSES = 20_000, 100
# Opens a source twice, for the first time and again, reads some images, and prints the growth of
# the peak memory in MiB.
PROBE = """
import resource, sys
import numpy as np
from simsiam_jax import config as config_lib, lazy_tf
from simsiam_jax.data import sources
from simsiam_jax.tasks import inputs

data = config_lib.default().data
data.tfds_data_dir, data.range = sys.argv[2], 'dtype'
if sys.argv[1].startswith('tfds:'):
    lazy_tf.load()
    import tensorflow_datasets
if sys.argv[1].startswith('parquet:'):
    import pyarrow.parquet
inputs.open_images(sys.argv[3], data).read(0)  # imports what this kind needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    source = inputs.open_images(sys.argv[1], data)
    sources.fingerprint(source)
    for i in np.linspace(0, len(source) - 1, 1000).astype(int):
        source.read(int(i))
print(len(source), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


def jpegs() -> list[bytes]:
    rng, encoded = np.random.default_rng(0), []
    for _ in range(200):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48)).save(
            buffer, 'JPEG'
        )
        encoded.append(buffer.getvalue())
    return encoded


def write(kind: str, folder: pathlib.Path, count: int) -> str:
    """Writes a number of images in `folder` in one form, and returns the source."""
    encoded = jpegs()
    names = [f'n{i % CLASSES:04}/n{i % CLASSES:04}_{i:06}.jpg' for i in range(count)]
    images = [encoded[i % len(encoded)] for i in range(count)]
    folder.mkdir()
    if kind in ('folder', 'files'):
        for label in range(CLASSES):
            (folder / f'n{label:04}').mkdir()
        for i, name in enumerate(names):
            if i < len(encoded):
                (folder / name).write_bytes(images[i])
            else:
                os.link(folder / names[i % len(encoded)], folder / name)
        (folder / 'list.csv').write_text('\n'.join(f'{name},{name[:5]}' for name in names))
        return f'folder:{folder}' if kind == 'folder' else f'files:{folder}/list.csv'
    if kind == 'zip':
        with zipfile.ZipFile(folder / 'a.zip', 'w') as file:
            for name, image in zip(names, images, strict=True):
                file.writestr(name, image)
        return f'zip:{folder}/a.zip'
    if kind == 'tar':
        with tarfile.open(folder / 'a.tar', 'w') as file:
            for name, image in zip(names, images, strict=True):
                member = tarfile.TarInfo(name)
                member.size = len(image)
                file.addfile(member, io.BytesIO(image))
        return f'tar:{folder}/a.tar'
    if kind in ('npz', 'npy'):
        pixels = np.zeros((count, 48, 64, 3), np.uint8)
        if kind == 'npy':
            np.save(folder / 'a.npy', pixels)
            return f'npy:{folder}/a.npy'
        np.savez(folder / 'a.npz', images=pixels)
        return f'npz:{folder}/a.npz'
    if kind == 'parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq

        labels = [name[:5] for name in names]
        pq.write_table(
            pa.table({'image': images, 'label': labels}), folder / 'a.parquet', row_group_size=16
        )
        return f'parquet:{folder}/a.parquet'
    lazy_tf.load()
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(48, 64, 3), encoding_format='jpeg')
    label = tfds.features.ClassLabel(num_classes=CLASSES)
    rows = ((i, {'image': io.BytesIO(x), 'label': i % CLASSES}) for i, x in enumerate(images))
    name = f'{kind.replace("_", "")}{count}'
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version='1.0.0',
        features=tfds.features.FeaturesDict({'image': image, 'label': label}),
        split_datasets={'train': rows},
        data_dir=str(folder.parent / 'tfds'),
        file_format=kind,
        disable_shuffling=True,
    )
    return f'tfds:{name}/train'


# The index of 1.28 million images may take 1.5 GiB, that of 20,000 a 64th of it, 24 MiB. Arrays of
# 176 MiB are in memory (npz), or pages of the file, which the system may take back (npy).
@pytest.mark.long
@pytest.mark.parametrize(
    ('kind', 'most'),
    [
        *(('folder', 24), ('files', 24), ('zip', 24), ('tar', 24), ('npz', 400), ('npy', 200)),
        *(('parquet', 60), ('array_record', 24), ('tfrecord', 24)),
    ],
)
def test_index_of_many_images_is_small(kind: str, most: int, tmp_path: pathlib.Path) -> None:
    sources = [write(kind, tmp_path / name, n) for name, n in (('many', COUNT), ('few', 200))]
    done = subprocess.run(
        [sys.executable, '-c', PROBE, sources[0], str(tmp_path / 'tfds'), sources[1]],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(tmp_path / 'cache')},
        capture_output=True,
        text=True,
        check=True,
    )
    count, growth = map(float, done.stdout.split()[-2:])
    assert count == COUNT
    assert growth < most


@pytest.mark.long
def test_many_images_fit_into_memory(tmp_path: pathlib.Path) -> None:
    script = ROOT / 'benchmarks' / 'imagenet_scale.py'
    done = subprocess.run(
        [sys.executable, str(script), '--count=20000', f'--folder={tmp_path}'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.strip('|').split('|') for line in done.stdout.splitlines()[2:]]
    peaks = {what.strip(): float(peak.removesuffix(' GiB ')) for what, _, peak in rows}
    assert len(peaks) == 17
    assert all(
        peak < 0.5 for what, peak in peaks.items() if what.startswith(('TFRecord', 'RankMe'))
    )
    assert max(peaks.values()) < 2.5  # with eight devices and batches on the way to them
    assert not list(tmp_path.iterdir())
