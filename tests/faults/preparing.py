"""Lets two processes prepare the same TFDS dataset; prints the outcomes.

PYTHONPATH=. python tests/faults/preparing.py [TRIALS]

In TRIALS (10) trials, in turn, two runs, or two processes of one run, start with an empty data_dir
and with a dataset that TFDS has to generate. Both must train to the end with the same images.
"""

import os
import pathlib
import random
import sys
import tempfile
import time

import kills

# Python imports a module of this name at its start.
CUSTOMIZE = """
import importlib.util
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != 'tensorflow_datasets.core.download.downloader':
            return None
        import tensorflow_datasets as tfds

        class Slowly(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                image = tfds.features.Image(shape=(8, 8, 1))
                label = tfds.features.ClassLabel(num_classes=10)
                features = tfds.features.FeaturesDict({'image': image, 'label': label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {'train': self._generate_examples()}

            def _generate_examples(self):
                import time

                import numpy as np

                for i in range(300):
                    time.sleep(0.005)
                    image = np.random.default_rng(i).integers(0, 256, (8, 8, 1), np.uint8)
                    yield i, {'image': image, 'label': i % 10}

        sys.meta_path.remove(self)
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, Finder())
"""
FLAGS = (
    '--config.data.source=tfds:slowly/train',
    '--config.data.backend=host',
    '--config.eval.train=',
    '--config.eval.test=',
    '--config.epochs=1',
)


def trial(kind: str, folder: pathlib.Path) -> str:
    """Starts both processes at nearly the same time; returns which one waited for the other."""
    logs = [folder / f'logs{i}' for i in range(2)]
    flags = (*FLAGS, f'--config.data.tfds_data_dir={folder}/tfds')
    if kind == 'one run':
        processes = kills.start(folder / 'run', 2, *flags, logs=logs[0])
        outputs = [logs[0] / f'process{i}.log' for i in range(2)]
    else:
        processes = []
        for i in range(2):
            processes += kills.start(folder / f'run{i}', 1, *flags, logs=logs[i])
            time.sleep(random.uniform(0, 1))
        outputs = [log / 'process0.log' for log in logs]
    codes = kills.end(processes)
    texts = [path.read_text() for path in outputs]
    if codes != [0, 0]:
        raise AssertionError(f'{kind}: {codes}: {texts}')
    if kind == 'two runs' and (names := kills.differing(folder / 'run0', folder / 'run1')):
        raise AssertionError(f'the runs differ in {names}')
    waited = ['waiting for another process that prepares' in text for text in texts]
    return f'{waited.count(True)} waited'


def run(trials: int, folder: pathlib.Path) -> None:
    (folder / 'sitecustomize.py').write_text(CUSTOMIZE)
    os.environ['PYTHONPATH'] = f'{folder}:{kills.ROOT}'
    for number in range(trials):
        kind = ('two runs', 'one run')[number % 2]
        print(f'{kind}: both trained, {trial(kind, folder / str(number))}', flush=True)
    print(f'{trials} trials: two processes prepared one data_dir, both trained')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 10, pathlib.Path(scratch))
