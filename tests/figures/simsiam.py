"""SimSiam in PyTorch: writes simsiam.npz, the figures that test_parity.py compares with.

    python tests/figures/simsiam.py    # PyTorch 2.13.0, CPU, float32

Written from the papers and from torchvision's documented semantics. Modules bear the names
that their counterparts have in Flax.
"""

import math
import pathlib
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 8
EPOCHS, STEPS_PER_EPOCH = 3, 2
RATE = 0.32 * BATCH / 256
DIM, PREDICTOR_WIDTH = 16, 8


class Block(nn.Module):
    """A residual block: convolutions of (size, channels), the stride in the first 3x3."""

    def __init__(self, channels_in: int, convs: list[tuple[int, int]], stride: int):
        super().__init__()
        self.depth = len(convs)
        strided = next(i for i, (size, _) in enumerate(convs) if size == 3)
        c = channels_in
        for i, (size, channels) in enumerate(convs):
            s = stride if i == strided else 1
            conv = nn.Conv2d(c, channels, size, s, padding=size // 2, bias=False)
            self.add_module(f'conv{i + 1}', conv)
            self.add_module(f'bn{i + 1}', nn.BatchNorm2d(channels))
            c = channels
        self.project = stride != 1 or channels_in != c
        if self.project:
            self.downsample_conv = nn.Conv2d(channels_in, c, 1, stride, bias=False)
            self.downsample_bn = nn.BatchNorm2d(c)

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f'bn{i}')(self.get_submodule(f'conv{i}')(y))
            if i < self.depth:
                y = F.relu(y)
        if self.project:
            x = self.downsample_bn(self.downsample_conv(x))
        return F.relu(x + y)


def basic(channels: int) -> list[tuple[int, int]]:
    return [(3, channels), (3, channels)]


def bottleneck(channels: int) -> list[tuple[int, int]]:
    return [(1, channels), (3, channels), (1, 4 * channels)]


class ResNet(nn.Module):
    def __init__(self, block, stages: tuple[int, ...], stem: str, width: int):
        super().__init__()
        self.stem = stem
        size, stride = (7, 2) if stem == 'imagenet' else (3, 1)
        self.conv1 = nn.Conv2d(3, width, size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = []
        c = width
        for i, blocks in enumerate(stages):
            for j in range(blocks):
                convs = block(width * 2**i)
                self.blocks.append(f'layer{i + 1}_{j}')
                self.add_module(self.blocks[-1], Block(c, convs, 2 if i > 0 and j == 0 else 1))
                c = convs[-1][1]
        self.features = c

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == 'imagenet':
            x = F.max_pool2d(x, 3, 2, padding=1)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


class Projector(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.fc1 = nn.Linear(features, DIM, bias=False)
        self.bn1 = nn.BatchNorm1d(DIM)
        self.fc2 = nn.Linear(DIM, DIM, bias=False)
        self.bn2 = nn.BatchNorm1d(DIM)
        self.fc3 = nn.Linear(DIM, DIM, bias=False)
        self.bn3 = nn.BatchNorm1d(DIM, affine=False)

    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.bn2(self.fc2(x)))
        return self.bn3(self.fc3(x))


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(DIM, PREDICTOR_WIDTH, bias=False)
        self.bn1 = nn.BatchNorm1d(PREDICTOR_WIDTH)
        self.fc2 = nn.Linear(PREDICTOR_WIDTH, DIM)

    def forward(self, z):
        return self.fc2(F.relu(self.bn1(self.fc1(z))))


class SimSiam(nn.Module):
    def __init__(self, backbone: ResNet):
        super().__init__()
        self.backbone = backbone
        self.projector = Projector(backbone.features)
        self.predictor = Predictor()

    def forward(self, view):
        feature = self.backbone(view)
        z = self.projector(feature)
        return feature, z, self.predictor(z)


def loss_of(outputs) -> torch.Tensor:
    (_, z1, p1), (_, z2, p2) = outputs
    d1 = -F.cosine_similarity(p1, z2.detach()).mean()
    d2 = -F.cosine_similarity(p2, z1.detach()).mean()
    return (d1 + d2) / 2


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A function of the name; BN scales around 1, since at 0 most gradients would vanish."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        weight = noise * math.sqrt(2 / math.prod(shape[1:]))
    else:
        weight = noise / 4 + ('bn' in name and name.endswith('weight'))
    # Exact in float16, which halves the file.
    return weight.astype(np.float16)


def make_views(seed: int, step: int, size: int) -> list[np.ndarray]:
    """Two views [B, H, W, C] of bytes that no NumPy version changes: noise on a flat color."""
    raw = np.random.PCG64([seed, step]).random_raw(2 * BATCH * size * size * 3 // 8)
    x = raw.astype('<u8').view(np.uint8).reshape(2, BATCH, size, size, 3).astype(np.float32)
    x = x / 128 - 1
    return list(x + x[:, :, :1, :1])


def figures(backbone: ResNet, seed: int, size: int) -> dict[str, np.ndarray]:
    model = SimSiam(backbone).train()
    weights = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights[name] = make_weight(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(weights[name]))

    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):

            def count(module, inputs, name=name):
                counts[name] = np.int32(inputs[0].numel() // module.num_features)

            module.register_forward_pre_hook(count)

    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.SGD(
        [{'params': encoder}, {'params': model.predictor.parameters()}],
        lr=RATE,
        momentum=0.9,
        weight_decay=1e-4,
    )
    losses, out = [], {}
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        epoch = step // STEPS_PER_EPOCH
        optimizer.param_groups[0]['lr'] = RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        views = [
            torch.from_numpy(view).permute(0, 3, 1, 2) for view in make_views(seed, step, size)
        ]
        outputs = [model(view) for view in views]
        loss = loss_of(outputs)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            for i, view in enumerate(outputs, 1):
                for name, value in zip(('feature', 'z', 'p'), view, strict=True):
                    out[f'{name}{i}'] = value.detach().numpy()
            out['gradients'] = pack({n: p.grad.numpy() for n, p in model.named_parameters()})
            out['statistics'] = pack(statistics(model))
        optimizer.step()
    return out | {
        'weights': pack(weights),
        'counts': pack(counts),
        'losses': np.float32(losses),
        'trained_weights': pack({n: p.detach().numpy() for n, p in model.named_parameters()}),
        'trained_statistics': pack(statistics(model)),
    }


def statistics(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: b.numpy() for name, b in model.named_buffers() if 'running' in name}


def pack(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One record with a field for each array: members of an npz cost 250 bytes each."""
    record = np.zeros((), [(name, array.dtype, array.shape) for name, array in arrays.items()])
    for name, array in arrays.items():
        record[name] = array
    return record


def main() -> None:
    torch.set_num_threads(1)
    # Where rounding moves a ReLU's input across 0 or the choice of a max-pool, the gradients
    # jump, and six steps multiply that. Small images and these seeds keep clear of it: noise of
    # 1e-6 on the inputs of all ReLUs moves no trained weight by more than 1e-4 of its change.
    networks = {
        'resnet50': (ResNet(bottleneck, (1, 1), 'imagenet', width=4), 66, 32),
        'resnet18': (ResNet(basic, (1, 1), 'cifar', width=4), 13, 8),
    }
    everything = {
        f'{network}/{name}': value
        for network, arguments in networks.items()
        for name, value in figures(*arguments).items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **everything)


if __name__ == '__main__':
    main()
