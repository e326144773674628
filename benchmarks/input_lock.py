"""Images/s that Python's global lock allows a process, whatever the number of cores.

    PYTHONPATH=. python benchmarks/input_lock.py [--images=256] [--batches=40]

Decoding and resizing run without the lock and are replaced by functions that do nothing. What is
left is the Python of the input pipeline, reading small files included. A host whose GPUs take more
images/s than this needs several processes.
"""

import argparse
import pathlib
import tempfile
import time
from unittest import mock

import numpy as np
from PIL import Image

from simsiam_jax.data import geometry, host, raster_files, sources
from simsiam_jax.data.raster import Raster
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler

BATCH, SIZE = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--images', type=int, default=1024)
    parser.add_argument('--batches', type=int, default=40)
    arguments = parser.parse_args()
    decoded = Raster(np.zeros((SIZE, SIZE, 3), np.uint8))
    recipe = Recipe(size=SIZE, blur=0.0)

    def read(*_: bytes, **__: bool) -> Raster:
        return decoded

    def resize(*_: object) -> None:
        return None

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(raster_files, 'read', read),
        mock.patch.object(geometry, 'crop_resize_into', resize),
    ):
        for i in range(arguments.images):
            Image.new('RGB', (8, 8)).save(pathlib.Path(folder) / f'{i}.jpg')
        reader = Reader(sources.open_source(f'folder:{folder}'), 3)
        for on_device in ('color', 'all'):
            batches = host.train_batches(
                reader,
                IndexSampler(0, len(reader), BATCH),
                (recipe, recipe),
                on_device=on_device,
                canvas=SIZE,
                start=0,
                stop=arguments.batches + 4,
                local=slice(0, BATCH),
            )
            for _ in range(4):
                next(batches)
            start = time.perf_counter()
            for _ in batches:
                pass
            rate = BATCH * arguments.batches / (time.perf_counter() - start)
            print(f'lock-bound images/s a process, on_device={on_device}: {rate:,.0f}')


if __name__ == '__main__':
    main()
