"""Fine-tuning with a tenth of the digits' labels, from a checkpoint and from scratch.

    python benchmarks/few_labels.py --checkpoint=runs/quickstart

trains at several rates of the backbone with five seeds each (different labeled images and
batches), and prints mean and standard deviation of test top-1. For both, the best rate counts.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RATES = {'checkpoint': (0.03, 0.1, 0.3), 'scratch': (0.1, 0.3, 1.0)}


def top1(checkpoint: str, *, scratch: bool, rate: float, seed: int) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable,
            '-m',
            'simsiam_jax.main',
            '--config=configs/finetune.py:10pct',
            f'--workdir={workdir}',
            f'--config.init_from={checkpoint}',
            f'--config.from_scratch={scratch}',
            f'--config.seed={seed}',
            f'--config.optim.backbone_learning_rate={rate}',
            '--config.optim.learning_rates=(1.0,)',
            '--config.batch_size=64',
            '--config.epochs=100',
            '--config.augment.crop_scale=(0.6,1.0)',
            '--config.augment.rotation=15.0',
            '--config.augment.flip=0.0',
            '--config.log.tensorboard=False',
            '--config.checkpoint.every_epochs=100',
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((pathlib.Path(workdir) / 'result.json').read_text())['top1']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--checkpoint', default='runs/quickstart')
    parser.add_argument('--seeds', type=int, default=5)
    given = parser.parse_args()
    checkpoint = str(pathlib.Path(given.checkpoint).absolute())
    for start, rates in RATES.items():
        for rate in rates:
            found = [
                top1(checkpoint, scratch=start == 'scratch', rate=rate, seed=seed)
                for seed in range(given.seeds)
            ]
            values = ' '.join(f'{x:.4f}' for x in found)
            print(
                f'from {start:10}  rate {rate:<5}  top-1 {np.mean(found):.4f} '
                f'+- {np.std(found, ddof=1):.4f}   ({values})',
                flush=True,
            )


if __name__ == '__main__':
    main()
