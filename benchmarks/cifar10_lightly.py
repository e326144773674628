"""SimSiam on CIFAR-10 beside lightly's (PyTorch): the same images, network and recipe, in turns.

    python benchmarks/cifar10_lightly.py --words=small,10ep,npz:cifar10.npz [--seed 0] [--json FILE]

needs the package, torch, torchvision and lightly. Each epoch of ours is followed by one of
lightly's in the same process, so that both meet the same load. lightly's side is written as its
documentation shows: its transform, heads and loss around a network of torchvision's blocks.
Network, batch, SGD, cosine and the predictor's constant rate are those of ours; both are evaluated
by the same kNN. Only the word `small` has a network that this script builds.
"""

import argparse
import json
import pathlib
import runpy
import time
from typing import Any

import jax
import lightly.transforms
import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead
from lightly.models.modules.heads import ProjectionHead
from ml_collections import ConfigDict
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchvision.models.resnet import BasicBlock

from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tasks.inputs import open_source

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


class Ours:
    """The training of simsiam_jax.tasks.pretrain, epoch by epoch."""

    def __init__(self, config: ConfigDict):
        self._setup = pretrain_setup.build(config)
        self._step = pretrain_setup.build_step(config, self._setup)
        self._state = self._setup.init()
        self.parameters = sum(x.size for x in jax.tree.leaves(self._state.params))
        self.steps = self._setup.sampler.steps_per_epoch

    def train(self, epoch: int) -> None:
        for batch in self._setup.batches(epoch * self.steps, (epoch + 1) * self.steps):
            self._state, metrics = self._step(self._state, batch)
        float(metrics['loss'])

    def knn(self) -> float:
        variables = checkpoint.encoder_variables(self._state)
        (score,) = self._setup.knn(self._setup.encode, variables)
        return score.top1


class Lightly:
    """SimSiam of lightly on the same images."""

    def __init__(self, config: ConfigDict, seed: int):
        torch.manual_seed(seed)
        self._config = config
        images, self._test = (
            open_source(s, config.data) for s in (config.eval.train, config.eval.test)
        )
        self._train = images
        widths = [round(64 * config.model.width_multiplier) * 2**i for i in range(3)]
        blocks, before = [], widths[0]
        for i, width in enumerate(widths):
            shortcut = None
            if i:
                shortcut = nn.Sequential(
                    nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width)
                )
            blocks.append(BasicBlock(before, width, 2 if i else 1, shortcut))
            before = width
        self._backbone = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for module in self._backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        dim, hidden = config.method.dim, config.method.predictor_hidden_dim
        # Two layers, as lightly's own benchmark on CIFAR-10 and appendix D of the paper.
        self._projector = ProjectionHead(
            [
                (before, dim, nn.BatchNorm1d(dim), nn.ReLU(inplace=True)),
                (dim, dim, nn.BatchNorm1d(dim, affine=False), None),
            ]
        )
        self._predictor = SimSiamPredictionHead(dim, hidden, dim)
        self._backbone.to(memory_format=torch.channels_last)
        self._rate = config.optim.learning_rate * config.batch_size / 256
        self._optimizer = torch.optim.SGD(
            [
                {'params': [*self._backbone.parameters(), *self._projector.parameters()]},
                {'params': self._predictor.parameters()},
            ],
            lr=self._rate,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        modules = (self._backbone, self._projector, self._predictor)
        self.parameters = sum(p.numel() for module in modules for p in module.parameters())
        self._loader = torch.utils.data.DataLoader(
            _Views(self._train, self._transform()),
            config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=torch.get_num_threads(),
            persistent_workers=True,
            multiprocessing_context='forkserver',  # JAX's threads do not survive a fork
        )

    def _transform(self) -> Any:
        a = self._config.augment
        return lightly.transforms.SimSiamTransform(
            input_size=a.size,
            min_scale=a.crop_scale[0],
            cj_prob=a.jitter,
            cj_strength=1.0,
            cj_bright=a.brightness,
            cj_contrast=a.contrast,
            cj_sat=a.saturation,
            cj_hue=a.hue,
            random_gray_scale=a.gray,
            gaussian_blur=a.blur,
            hf_prob=a.flip,
            normalize={'mean': a.mean, 'std': a.std},
        )

    def train(self, epoch: int) -> None:
        cosine = (1 + np.cos(np.pi * epoch / self._config.epochs)) / 2
        self._optimizer.param_groups[0]['lr'] = self._rate * cosine
        criterion = NegativeCosineSimilarity()
        self._backbone.train()
        for x0, x1 in self._loader:
            z0, z1 = (
                self._projector(self._backbone(x.to(memory_format=torch.channels_last)))
                for x in (x0, x1)
            )
            p0, p1 = self._predictor(z0), self._predictor(z1)
            loss = (criterion(p0, z1.detach()) + criterion(p1, z0.detach())) / 2
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        float(loss.detach())

    @torch.no_grad()
    def knn(self) -> float:
        """Returns top-1 of votes weighted by exp(similarity / T), as simsiam_jax.tasks.knn."""
        self._backbone.eval()
        bank, queries = self._features(self._train), self._features(self._test)
        k, temperature = self._config.eval.k, self._config.eval.temperature
        distance, index = (
            NearestNeighbors(n_neighbors=k, metric='cosine').fit(bank).kneighbors(queries)
        )
        votes = np.zeros((len(queries), len(self._train.classes)))
        weights = np.exp((1 - distance) / temperature)
        np.add.at(votes, (np.arange(len(queries))[:, None], self._train.labels[index]), weights)
        return float((votes.argmax(1) == self._test.labels).mean())

    def _features(self, images: ArraySource) -> np.ndarray:
        a = self._config.augment
        x = (images.images / np.float32(255) - np.float32(a.mean)) / np.float32(a.std)
        parts = torch.tensor(x).permute(0, 3, 1, 2).split(256)
        return np.concatenate([self._backbone(part).numpy() for part in parts])


class _Views(torch.utils.data.Dataset):
    def __init__(self, images: ArraySource, transform: Any):
        self._images, self._transform = images.images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._transform(Image.fromarray(self._images[index]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--words', default='small,10ep', help='words of configs/cifar10.py')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=pathlib.Path, help='file of the results')
    arguments = parser.parse_args()
    config = runpy.run_path(str(CONFIGS / 'cifar10.py'))['get_config'](arguments.words)
    config.seed = arguments.seed
    sides = {'ours': Ours(config), 'lightly': Lightly(config, arguments.seed)}
    counts = [side.parameters for side in sides.values()]
    if counts[0] != counts[1]:
        raise ValueError(f'the networks differ: {counts[0]:,} and {counts[1]:,} parameters')
    images = sides['ours'].steps * config.batch_size
    rows = [[0, *(side.knn() for side in sides.values()), 0.0, 0.0]]
    for epoch in range(config.epochs):
        rates = []
        for side in sides.values():
            begin = time.perf_counter()
            side.train(epoch)
            rates.append(images / (time.perf_counter() - begin))
        if (epoch + 1) % config.eval.every_epochs == 0 or epoch + 1 == config.epochs:
            scores = [side.knn() for side in sides.values()]
            rows.append([epoch + 1, *scores, *rates])
            print(
                f'epoch {epoch + 1}: kNN {scores[0]:.4f} and {scores[1]:.4f} (lightly), '
                f'{rates[0]:.0f} and {rates[1]:.0f} images/s',
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows) + '\n')


if __name__ == '__main__':
    main()
