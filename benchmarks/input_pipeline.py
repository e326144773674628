"""The input pipeline against the official SimSiam recipe in torchvision, and lightly's, in one run.

    python benchmarks/input_pipeline.py [--images=DIR]

needs the package, torch, torchvision and lightly. Every pipeline computes two normalized 224 views
of the same JPEGs, in interleaved rounds. The result is images per CPU-second (all threads of the
process), the median over rounds. Without --images, JPEGs of about 500x375 are created from
scikit-learn's photographs.
"""

import argparse
import io
import pathlib
import random
import statistics
import tempfile
import time

import lightly.transforms
import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision import transforms

from simsiam_jax.data import host, sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler

BATCH = 64


def make_jpegs(folder: pathlib.Path, n: int = 200) -> None:
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(n):
        photograph = photographs[i % len(photographs)]
        h = int(rng.integers(220, 427))
        w = min(h * 4 // 3, 640)
        y, x = rng.integers(0, 427 - h + 1), rng.integers(0, 640 - w + 1)
        crop = Image.fromarray(photograph[y : y + h, x : x + w]).resize((500, 375), Image.LANCZOS)
        noisy = np.asarray(crop) + rng.normal(0, 4, (375, 500, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f'{i:03}.jpg', quality=int(rng.integers(88, 96)))


def official():
    """Returns the recipe of the paper's section 3 as PyTorch users run it, on single PIL images."""
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.Lambda(blur)], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
    )
    return lambda image: (view(image), view(image))


def torch_batches(transform, files):
    while True:
        batch = []
        for i in range(BATCH):
            with Image.open(io.BytesIO(files[i % len(files)].read_bytes())) as image:
                batch.append(transform(image.convert('RGB')))
        yield [torch.stack(views) for views in zip(*batch, strict=True)]


def our_batches(folder: pathlib.Path, on_device: str, count: int):
    source, recipe = sources.open_source(f'folder:{folder}'), Recipe()
    return host.train_batches(
        Reader(source, 3),
        IndexSampler(0, len(source), BATCH),
        (recipe, recipe),
        on_device=on_device,
        canvas=512,
        start=0,
        stop=count,
        local=slice(0, BATCH),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--images', type=pathlib.Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batches', type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.images or pathlib.Path(tempfile.mkdtemp())
    if not arguments.images:
        make_jpegs(folder)
    files = sorted(folder.rglob('*.jpg'))
    warm_up, count = 12, arguments.batches
    simsiam = lightly.transforms.SimSiamTransform()
    pipelines = {
        'torchvision, official recipe': lambda: torch_batches(official(), files),
        'lightly SimSiamTransform': lambda: torch_batches(simsiam, files),
    } | {
        f'on_device={value}': lambda value=value: our_batches(folder, value, warm_up + count + 12)
        for value in host.ON_DEVICE
    }
    figures = {name: [] for name in pipelines}
    for _ in range(arguments.rounds):
        for name, make in pipelines.items():
            batches = make()
            # Our pipelines compile and fill their prefetch buffers first.
            for _ in range(warm_up if name.startswith('on_device') else 1):
                next(batches)
            cpu = time.process_time()
            for _ in range(count):
                next(batches)
            figures[name].append(BATCH * count / (time.process_time() - cpu))
            del batches
    base = statistics.median(figures['torchvision, official recipe'])
    print('| pipeline | images per CPU-second | ratio |\n|---|---|---|')
    for name, values in figures.items():
        median = statistics.median(values)
        print(f'| {name} | {median:.0f} | {median / base:.2f} |')


if __name__ == '__main__':
    main()
