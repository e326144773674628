"""Benefit of the doctor's advice on gray images: scikit-learn's digits as PNGs of 300 pixels.

    python benchmarks/doctor.py --workdir=DIR --epochs=40

writes the images, lets the doctor write a configuration from configs/folder.py, and trains it for
this number of epochs. Prints kNN on the held-out fifth, also for raw pixels and the random network.
The doctor's file is used with one change that pixels cannot show: a mirrored digit is a different
sign, so there is no flip.
"""

import argparse
import pathlib
import subprocess
import sys

from PIL import Image

from simsiam_jax.data import sources

ROOT = pathlib.Path(__file__).parent.parent


def write_images(folder: pathlib.Path) -> None:
    for part in ('train', 'test'):
        digits = sources.open_source(f'digits/{part}')
        for i, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
            path = folder / part / str(label) / f'{i:04}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            large = Image.fromarray(image[..., 0]).resize((300, 300), Image.Resampling.BILINEAR)
            large.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--epochs', type=int, default=40)
    given = parser.parse_args()
    images, written = given.workdir / 'images', given.workdir / 'mine.py'
    write_images(images)
    written.unlink(missing_ok=True)
    python = [sys.executable, '-m']
    doctor = ['simsiam_jax.tools.doctor', '--config=configs/folder.py', f'--write={written}']
    doctor += [f'--config.eval.{part}=folder:{images}/{part}' for part in ('train', 'test')]
    doctor += [f'--config.data.source=folder:{images}/train']
    subprocess.run([*python, *doctor], cwd=ROOT, check=True)
    run = ['simsiam_jax.main', f'--config={written}', f'--workdir={given.workdir / "run"}']
    run += [f'--config.epochs={given.epochs}', '--config.augment.flip=0.0']
    run += ['--config.eval.baselines=True', '--config.log.tensorboard=False']
    run += [f'--config.checkpoint.every_epochs={given.epochs}.0']
    subprocess.run([*python, *run], cwd=ROOT, check=True)


if __name__ == '__main__':
    main()
